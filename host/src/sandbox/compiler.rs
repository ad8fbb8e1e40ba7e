//! Compiling is an attack surface: a few hundred KB of hostile module can take a compiler minutes and gigabytes. So a host compiles in a process of
//! its own for each module, with bounds that the kernel keeps: processor time, address space, no files. The gateway's threads and the guests' never do it.
//!
//! [`compile_here`] is the compiler; [`compile_apart`] starts a process that runs [`serve`], gives it the module on its standard input, and takes the
//! compiled bytes from its standard output. Who wants no second process (`turnhouse run`, tests of the sandbox) compiles here.

use std::io::{Read, Write};
use std::path::Path;
use std::process::{ExitStatus, Stdio};

use bytes::Bytes;
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWriteExt as _};
use tokio::process::Command;
use wasmtime::Engine;

use super::bulk;
use super::engine::{self, Allocator};
use super::inspect::{ModuleRefusal, features};
use crate::limits::Limits;

/// The hidden command that a host starts for each module.
pub const COMMAND: &str = "compile-module";

/// What is kept of what a compiler's process says on its standard error.
const STDERR_BYTES_MAX: u64 = 4 * 1024;

/// Of an error's text, in a message.
const REASON_CHARS_MAX: usize = 300;

/// The first line on the compiler's standard input; the module follows.
#[derive(Serialize, Deserialize)]
struct Request {
    limits: Limits,
    allocator: Allocator,
}

/// The first line on its standard output; where it compiled, the compiled module follows.
#[derive(Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Answer {
    Compiled,
    Invalid(String),
    TooComplex(String),
}

/// Validates and compiles. Takes long: only ever on a thread that may be kept busy.
pub(super) fn compile_here(engine: &Engine, wasm: &[u8]) -> Result<Vec<u8>, ModuleRefusal> {
    let shown = |reason: String| reason.chars().take(REASON_CHARS_MAX).collect::<String>();
    wasmparser::Validator::new_with_features(features()).validate_all(wasm).map_err(|error| {
        let reason = shown(error.to_string());
        ModuleRefusal::Invalid(format!(
            "the module is not valid: {reason}; build it for wasm32-wasip1 without newer proposals"
        ))
    })?;
    let wasm = bulk::in_pieces(wasm).map_err(|error| ModuleRefusal::Invalid(shown(error.to_string())))?;
    // What is valid and still refused is over a limit of the compiler.
    engine.precompile_module(&wasm).map_err(|error| {
        let reason = shown(format!("{error:#}"));
        ModuleRefusal::TooComplex(format!("the module is more than this host compiles: {reason}; link less into it"))
    })
}

/// The same in a process of `program`. Dropping the future kills it.
pub(super) async fn compile_apart(
    program: &Path,
    limits: &Limits,
    allocator: Allocator,
    wasm: Bytes,
) -> Result<Vec<u8>, ModuleRefusal> {
    let failed = |error: std::io::Error| {
        tracing::error!(%error, "the compiler's process could not be run");
        ModuleRefusal::TooComplex(
            "the host could not start its compiler; send the module again, or tell the operator".to_owned(),
        )
    };
    let mut child = Command::new(program)
        .arg(COMMAND)
        // Nothing of the host's is its business.
        .env_clear()
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .map_err(failed)?;
    let (mut stdin, stdout, stderr) =
        (child.stdin.take().expect("piped"), child.stdout.take().expect("piped"), child.stderr.take().expect("piped"));
    let mut request = serde_json::to_vec(&Request { limits: limits.clone(), allocator }).expect("limits are JSON");
    request.push(b'\n');
    let write = async {
        // A compiler that has died reads nothing more; how it ended says why.
        let _ = stdin.write_all(&request).await;
        let _ = stdin.write_all(&wasm).await;
        drop(stdin);
    };
    let output_max = limits.compile_output_bytes_max as u64;
    let ((), output, errors) =
        tokio::join!(write, read_at_most(stdout, output_max), read_at_most(stderr, STDERR_BYTES_MAX));
    let output = output.map_err(failed)?;
    if output.len() as u64 > output_max {
        return Err(ModuleRefusal::TooComplex(format!(
            "the module compiles to more than {output_max} bytes; link less into it, or have the operator raise limits.compile_output_bytes_max"
        )));
    }
    let status = child.wait().await.map_err(failed)?;
    if !status.success() {
        let said = errors.unwrap_or_default();
        tracing::warn!(%status, said = %String::from_utf8_lossy(&said), "the compiler did not survive a module");
        return Err(died(status, limits));
    }
    answer(output).unwrap_or_else(|| {
        tracing::error!("the compiler's process answered with something else than an answer");
        Err(ModuleRefusal::TooComplex("the compiler failed on the module; build it with another toolchain".to_owned()))
    })
}

/// At most one byte more than `bytes_max`. The rest stays unread, and whoever writes it is killed with the future that owns it.
async fn read_at_most(from: impl AsyncRead + Unpin, bytes_max: u64) -> std::io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    from.take(bytes_max + 1).read_to_end(&mut bytes).await?;
    Ok(bytes)
}

fn answer(mut output: Vec<u8>) -> Option<Result<Vec<u8>, ModuleRefusal>> {
    let line = output.iter().position(|byte| *byte == b'\n')?;
    Some(match serde_json::from_slice(&output[..line]).ok()? {
        Answer::Compiled => {
            output.drain(..=line);
            Ok(output)
        }
        Answer::Invalid(why) => Err(ModuleRefusal::Invalid(why)),
        Answer::TooComplex(why) => Err(ModuleRefusal::TooComplex(why)),
    })
}

fn died(status: ExitStatus, limits: &Limits) -> ModuleRefusal {
    use std::os::unix::process::ExitStatusExt as _;
    match status.signal() {
        // What the kernel sends when processor time is used up.
        Some(signal)
            if signal == rustix::process::Signal::XCPU.as_raw() || signal == rustix::process::Signal::KILL.as_raw() =>
        {
            ModuleRefusal::CompileTimeout { timeout_ms: limits.compile_timeout_ms }
        }
        _ => ModuleRefusal::TooComplex(format!(
            "compiling the module takes more than {} bytes of memory, or is more than the compiler can do; split its largest functions, or have the operator raise limits.compile_memory_bytes_max",
            limits.compile_memory_bytes_max
        )),
    }
}

/// The compiler's process: reads a request and a module, bounds itself, compiles, answers.
pub fn serve(input: &mut dyn Read, output: &mut dyn Write) -> anyhow::Result<()> {
    let request: Request = serde_json::from_slice(&line(input)?)?;
    bound(&request.limits)?;
    let mut wasm = Vec::new();
    input.take(request.limits.module_bytes_max as u64 + 1).read_to_end(&mut wasm)?;
    let engine = engine::for_compiling(&request.limits, request.allocator)?;
    let (answer, compiled) = match compile_here(&engine, &wasm) {
        Ok(compiled) => (Answer::Compiled, compiled),
        Err(ModuleRefusal::Invalid(why)) => (Answer::Invalid(why), Vec::new()),
        Err(other) => (Answer::TooComplex(other.to_string()), Vec::new()),
    };
    serde_json::to_writer(&mut *output, &answer)?;
    output.write_all(b"\n")?;
    output.write_all(&compiled)?;
    Ok(output.flush()?)
}

fn line(input: &mut dyn Read) -> anyhow::Result<Vec<u8>> {
    const BYTES_MAX: usize = 64 * 1024;
    let mut line = Vec::new();
    let mut byte = [0];
    while line.len() < BYTES_MAX && input.read(&mut byte)? == 1 && byte[0] != b'\n' {
        line.push(byte[0]);
    }
    Ok(line)
}

/// What the kernel holds this process to from now on, before it has seen a byte of the module.
fn bound(limits: &Limits) -> anyhow::Result<()> {
    use rustix::process::{Resource, Rlimit, setrlimit};
    let at_most = |most: u64| Rlimit { current: Some(most), maximum: Some(most) };
    let cpu_s = limits.compile_timeout_ms.div_ceil(1_000).max(1);
    // At the soft bound SIGXCPU, a second later SIGKILL.
    setrlimit(Resource::Cpu, Rlimit { current: Some(cpu_s), maximum: Some(cpu_s + 1) })?;
    setrlimit(Resource::Fsize, at_most(0))?;
    setrlimit(Resource::Core, at_most(0))?;
    // Not everywhere: macOS has no bound on address space.
    if cfg!(target_os = "linux") {
        setrlimit(Resource::As, at_most(limits.compile_memory_bytes_max as u64))?;
    }
    let _ = rustix::process::nice(10);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_is_a_line_and_what_follows() {
        assert_eq!(answer(b"\"compiled\"\n\0asm\n".to_vec()).unwrap().unwrap(), b"\0asm\n");
        let refused = answer(b"{\"invalid\":\"no\"}\n".to_vec()).unwrap().unwrap_err();
        assert_eq!(refused, ModuleRefusal::Invalid("no".to_owned()));
        for nonsense in [&b""[..], b"\"compiled\"", b"{}\n", b"running 3 tests\n"] {
            assert!(answer(nonsense.to_vec()).is_none(), "{nonsense:?}");
        }
    }

    #[test]
    fn how_a_compiler_died_says_which_bound_it_met() {
        use std::os::unix::process::ExitStatusExt as _;
        let limits = Limits::default();
        for signal in [24, 9] {
            assert_eq!(died(ExitStatus::from_raw(signal), &limits).code(), "compile_timeout");
        }
        for raw in [6, 11, 101 << 8] {
            assert_eq!(died(ExitStatus::from_raw(raw), &limits).code(), "module_too_complex");
        }
    }
}
