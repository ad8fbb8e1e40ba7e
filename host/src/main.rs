//! The program: parse the command line, build the gateway's runtime, run one command, map how it ended to an exit code.
//!
//! What the commands do is in `cli`; what they act on is the library. The guests' runtime is the sandbox's own.

use std::process::ExitCode;

use clap::Parser as _;

mod cli;

/// Also SQLite's. Allocation was a tenth of a turn's cost with the system's; this one gives memory back after a burst, where others kept a third more.
#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

fn main() -> ExitCode {
    let cli = cli::Cli::parse();
    // Half the cores, since guests and the journal have threads of their own; two at least, so that one thread which waits keeps nobody waiting.
    let workers = std::thread::available_parallelism().map_or(2, |cores| cores.get().div_ceil(2)).max(2);
    let runtime =
        tokio::runtime::Builder::new_multi_thread().worker_threads(workers).thread_name("gateway").enable_all().build();
    let runtime = match runtime {
        Ok(runtime) => runtime,
        Err(error) => {
            let error = cli::CliError::failed(format!("cannot start threads: {error}"));
            error.print();
            return error.exit_code();
        }
    };
    let ended = runtime.block_on(Box::pin(cli.run()));
    // Whatever still runs was given its time by its command; nobody waits for it twice.
    runtime.shutdown_background();
    match ended {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            error.print();
            error.exit_code()
        }
    }
}
