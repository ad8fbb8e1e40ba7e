//! The command line: one file per command under `cli/`, and here what they have in common: their list and the global options.
//!
//! Every command that prints data takes `--json`. Exit codes: 0 it worked, 1 it failed, 2 it was used wrongly. Data goes to stdout, all
//! else (errors, progress, statuses, logs) to stderr. Colour and progress bars only where a terminal is.

use clap::{Parser, Subcommand};

mod error;

mod output;

mod client;

mod follow;

mod transcript;

mod hosting;

mod serve;

mod dev;

mod database;

mod files;

mod run;

mod new;

mod deploy;

mod rollback;

mod chat;

mod agents;

mod workers;

mod conversations;

mod turns;

mod audit;

mod members;

mod export;

mod orgs;

mod starter;

mod keys;

mod inspect;

mod status;

mod migrate;

mod doctor;

mod compile_module;

pub use error::CliError;
use output::Output;

/// How a command ends.
pub type Result<T = (), E = CliError> = std::result::Result<T, E>;

const EXAMPLES: &str = "\
Examples:
  turnhouse new greeter                          a worker to start from
  turnhouse run greeter.wasm --message hello     one turn, no server
  turnhouse dev greeter.wasm                     a host on this machine
  turnhouse chat greeter                         talk to it

Exit codes: 0 it worked, 1 it failed, 2 it was used wrongly.";

/// Runs AI-agent workers as WebAssembly: each turn of a conversation in a fresh instance.
#[derive(Debug, Parser)]
#[command(name = "turnhouse", version, after_help = EXAMPLES, max_term_width = 100)]
pub struct Cli {
    /// Print JSON for machines
    #[arg(long, global = true)]
    json: bool,

    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run a host
    Serve(serve::Args),
    /// Run a host for this machine, with an org, a key and these workers
    Dev(dev::Args),
    /// Run one turn of a worker in this process: no server, no database
    Run(run::Args),
    /// Make a worker to start from
    New(new::Args),
    /// Upload a worker and point an agent at it
    Deploy(deploy::Args),
    /// Point an agent back at an older version of its worker
    Rollback(rollback::Args),
    /// Talk to an agent
    Chat(chat::Args),
    /// List, show, set and delete agents
    Agents(agents::Args),
    /// List, show and delete workers
    Workers(workers::Args),
    /// List, show, name and delete conversations
    Conversations(conversations::Args),
    /// List, show, cancel and follow turns
    Turns(turns::Args),
    /// Show who did what in the org
    Audit(audit::Args),
    /// List, add and remove members of the org
    Members(members::Args),
    /// Read out all of the org, or of a conversation, as JSON lines
    Export(export::Args),
    /// Make, list and delete orgs and give them members, on the database directly
    Orgs(orgs::Args),
    /// Make, list, rotate and revoke API keys, on the database directly
    Keys(keys::Args),
    /// Say what a module imports, exports and needs, and whether this host would accept it
    Inspect(inspect::Args),
    /// Show replicas and queues, from the database directly
    Status(status::Args),
    /// Bring the database's schema up to date, as the role that owns it
    Migrate(migrate::Args),
    /// Look for what would keep a host from working well
    Doctor(doctor::Args),
    /// Compile a module for the host that started this process
    #[command(hide = true)]
    CompileModule(compile_module::Args),
}

impl Cli {
    /// Runs the command.
    pub async fn run(self) -> Result {
        let output = Output { json: self.json };
        match self.command {
            Command::Serve(args) => serve::run(args, output).await,
            Command::Dev(args) => dev::run(args, output).await,
            Command::Run(args) => run::run(args, output).await,
            Command::New(args) => new::run(args, output),
            Command::Deploy(args) => deploy::run(args, output).await,
            Command::Rollback(args) => rollback::run(args, output).await,
            Command::Chat(args) => chat::run(args, output).await,
            Command::Agents(args) => agents::run(args, output).await,
            Command::Workers(args) => workers::run(args, output).await,
            Command::Conversations(args) => conversations::run(args, output).await,
            Command::Turns(args) => turns::run(args, output).await,
            Command::Audit(args) => audit::run(args, output).await,
            Command::Members(args) => members::run(args, output).await,
            Command::Export(args) => export::run(args, output).await,
            Command::Orgs(args) => orgs::run(args, output).await,
            Command::Keys(args) => keys::run(args, output).await,
            Command::Inspect(args) => inspect::run(args, output).await,
            Command::Status(args) => status::run(args, output).await,
            Command::Migrate(args) => migrate::run(args, output).await,
            Command::Doctor(args) => doctor::run(args, output).await,
            Command::CompileModule(args) => compile_module::run(args),
        }
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;
    use clap::error::ErrorKind;

    use super::*;

    #[test]
    fn the_command_line_is_well_formed() {
        Cli::command().debug_assert();
    }

    #[test]
    fn every_command_has_an_example_in_its_help() {
        fn check(command: &clap::Command) {
            for sub in command.get_subcommands().filter(|sub| sub.get_name() != "help") {
                let help = sub.get_after_help().map(ToString::to_string).unwrap_or_default();
                assert!(help.contains("Example"), "{} has no example", sub.get_name());
                assert!(help.contains("turnhouse "), "{}", sub.get_name());
                check(sub);
            }
        }
        check(&Cli::command());
    }

    #[test]
    fn examples_in_the_help_can_be_typed() {
        fn check(path: &[&str], command: &clap::Command) {
            for sub in command.get_subcommands().filter(|sub| sub.get_name() != "help") {
                let path = [path, &[sub.get_name()]].concat();
                let help = sub.get_after_help().map(ToString::to_string).unwrap_or_default();
                for line in help.lines().map(str::trim) {
                    let Some((_, typed)) = line.split_once("turnhouse ") else { continue };
                    let typed = typed.split("  ").next().unwrap_or(typed);
                    let words =
                        typed.split_whitespace().take_while(|word| !word.starts_with(['|', '<', '>', '#', '&']));
                    let words: Vec<String> = words.map(|word| word.trim_matches(['"', '\'', '`']).to_owned()).collect();
                    let parsed = Cli::try_parse_from(std::iter::once("turnhouse".to_owned()).chain(words));
                    assert!(
                        parsed.is_ok(),
                        "{path:?}: {line}: {}",
                        parsed.err().map(|e| e.to_string()).unwrap_or_default()
                    );
                }
                check(&path, sub);
            }
        }
        check(&[], &Cli::command());
    }

    #[test]
    fn used_wrongly_is_exit_code_2_and_says_what_is_wrong() {
        for (arguments, kind) in [
            (&["turnhouse", "frobnicate"][..], ErrorKind::InvalidSubcommand),
            (&["turnhouse", "agents", "show", "../etc"], ErrorKind::ValueValidation),
            (&["turnhouse", "turns", "show", "7"], ErrorKind::ValueValidation),
            (&["turnhouse", "run"], ErrorKind::MissingRequiredArgument),
            (&["turnhouse", "serve", "--listen", "nowhere"], ErrorKind::ValueValidation),
            (&["turnhouse", "run", "w.wasm", "--message", "a", "--input", "b"], ErrorKind::ArgumentConflict),
        ] {
            let error = Cli::try_parse_from(arguments).unwrap_err();
            assert_eq!((error.kind(), error.exit_code()), (kind, 2), "{arguments:?}");
        }
        assert_eq!(Cli::try_parse_from(["turnhouse", "--version"]).unwrap_err().exit_code(), 0);
    }

    #[test]
    fn json_can_stand_anywhere() {
        assert!(Cli::try_parse_from(["turnhouse", "dev", "--json"]).unwrap().json);
        assert!(Cli::try_parse_from(["turnhouse", "--json", "agents", "list"]).unwrap().json);
    }
}
