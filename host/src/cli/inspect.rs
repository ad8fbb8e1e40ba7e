//! `turnhouse inspect`: what a module imports, exports and needs, and whether this host would accept it, naming what is wrong.
//!
//! The description is read from the file alone, so that a module which is refused is described as well; the verdict is the sandbox's, with
//! this machine's configuration, by the same checks as an upload.

use std::path::PathBuf;

use anyhow::Context as _;
use serde::Serialize;
use serde_json::json;
use sha2::{Digest as _, Sha256};
use turnhouse::limits::Limits;
use turnhouse::sandbox::{ModuleRefusal, Sandbox, SandboxConfig};
use wasmparser::{Parser, Payload, TypeRef};

use super::database::load_config;
use super::deploy::read_module;
use super::output::{Output, printable};
use super::{CliError, Result};

const EXAMPLES: &str = "\
Examples:
  turnhouse inspect greeter.wasm
  turnhouse inspect greeter.wasm --json

Exit code 0 when this host would accept the module, 1 when not.";

/// Say what a module imports, exports and needs, and whether this host would accept it
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub struct Args {
    /// The module
    wasm: PathBuf,
}

/// What a file says of itself, as far as it can be read.
#[derive(Debug, Default, Serialize)]
struct Description {
    bytes: usize,
    digest: String,
    /// `module`, `component` or `unknown`.
    kind: &'static str,
    imports: Vec<String>,
    exports: Vec<String>,
    functions: u32,
    /// At the start, and the most that it declares.
    memory_bytes: Option<u64>,
    memory_bytes_declared_max: Option<u64>,
    /// Where reading stopped, when it did.
    #[serde(skip_serializing_if = "Option::is_none")]
    unreadable: Option<String>,
}

/// Runs it.
pub async fn run(args: Args, output: Output) -> Result {
    let wasm = read_module(&args.wasm)?;
    let mut description = Description {
        bytes: wasm.len(),
        digest: hex::encode(Sha256::digest(&wasm)),
        kind: kind(&wasm),
        ..Description::default()
    };
    if let Err(error) = describe(&wasm, &mut description) {
        description.unreadable = Some(error.message().to_owned());
    }
    let limits = load_config(None, Vec::new())?.limits;
    let sandbox = one_guest_sandbox(limits)?;
    let verdict = Box::pin(sandbox.compile(wasm)).await;
    tokio::task::spawn_blocking(move || sandbox.shutdown(std::time::Duration::ZERO))
        .await
        .context("cannot end the sandbox")?;
    let refusal = verdict.as_ref().err();
    if output.json {
        let mut shown = serde_json::to_value(&description).context("cannot print the description")?;
        shown["accepted"] = json!(refusal.is_none());
        shown["speaks"] = json!(verdict.as_ref().ok().map(|worker| worker.speaks()));
        shown["refusal"] = json!(refusal.map(|refusal| json!({"code": refusal.code(), "detail": refusal.to_string()})));
        output.json(&shown);
    } else {
        show(&description, output);
    }
    match verdict {
        Ok(worker) => {
            let speaks = if worker.speaks() { "emit and reply; its stdout goes to the log" } else { "stdout" };
            output.say(&format!("replies   through {speaks}"));
            output.say("accepted  this host would run it");
            Ok(())
        }
        Err(refusal) => Err(refused(&refusal)),
    }
}

/// An engine with the same settings as a host's, and room for one guest.
pub fn one_guest_sandbox(limits: Limits) -> Result<std::sync::Arc<Sandbox>> {
    let limits = Limits { host_running_max: 1, ..limits };
    let config = SandboxConfig { threads: 1, nice: 0, ..SandboxConfig::new(limits) };
    Ok(Sandbox::new(&config).context("cannot start the sandbox")?)
}

/// A module that this host does not take.
pub fn refused(refusal: &ModuleRefusal) -> CliError {
    CliError::failed(format!("this host would not run the module ({})", refusal.code())).help(refusal.to_string())
}

fn kind(wasm: &[u8]) -> &'static str {
    if Parser::is_core_wasm(wasm) {
        "module"
    } else if Parser::is_component(wasm) {
        "component"
    } else {
        "unknown"
    }
}

fn describe(wasm: &[u8], description: &mut Description) -> Result<(), wasmparser::BinaryReaderError> {
    const PAGE_BYTES: u64 = 65_536;
    if description.kind != "module" {
        return Ok(());
    }
    for payload in Parser::new(0).parse_all(wasm) {
        match payload? {
            Payload::ImportSection(section) => {
                for import in section.into_imports() {
                    let import = import?;
                    if let TypeRef::Memory(memory) = import.ty {
                        description.memory_bytes = Some(memory.initial.saturating_mul(PAGE_BYTES));
                    }
                    description.imports.push(format!("{}.{}", import.module, import.name));
                }
            }
            Payload::ExportSection(section) => {
                for export in section {
                    description.exports.push(export?.name.to_owned());
                }
            }
            Payload::FunctionSection(section) => description.functions = section.count(),
            Payload::MemorySection(section) => {
                for memory in section {
                    let memory = memory?;
                    description.memory_bytes = Some(memory.initial.saturating_mul(PAGE_BYTES));
                    description.memory_bytes_declared_max = memory.maximum.map(|max| max.saturating_mul(PAGE_BYTES));
                }
            }
            _ => {}
        }
    }
    Ok(())
}

fn show(description: &Description, output: Output) {
    let say = |name: &str, text: String| output.say(&format!("{name:9} {}", printable(&text)));
    say("kind", description.kind.to_owned());
    say("size", format!("{} bytes, {} functions", description.bytes, description.functions));
    say("digest", description.digest.clone());
    if let Some(bytes) = description.memory_bytes {
        let max = description.memory_bytes_declared_max.map(|max| format!(", at most {max}")).unwrap_or_default();
        say("memory", format!("{bytes} bytes at the start{max}"));
    }
    for (name, items) in [("imports", &description.imports), ("exports", &description.exports)] {
        say(name, if items.is_empty() { "nothing".to_owned() } else { items[0].clone() });
        items.iter().skip(1).for_each(|item| say("", item.clone()));
    }
    if let Some(why) = &description.unreadable {
        say("broken", why.clone());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn described(wat: &str) -> Description {
        let wasm = wat::parse_str(wat).unwrap();
        let mut description = Description { kind: kind(&wasm), ..Description::default() };
        describe(&wasm, &mut description).unwrap();
        description
    }

    #[test]
    fn a_module_is_described_also_when_no_host_would_take_it() {
        let description = described(
            r#"(module (import "env" "magic" (func)) (memory (export "memory") 2 4) (func (export "_start")) (func))"#,
        );
        assert_eq!(description.kind, "module");
        assert_eq!(description.imports, ["env.magic"]);
        assert_eq!(description.exports, ["memory", "_start"]);
        assert_eq!(description.functions, 2);
        assert_eq!((description.memory_bytes, description.memory_bytes_declared_max), (Some(131_072), Some(262_144)));
    }

    #[test]
    fn what_is_no_module_is_named() {
        assert_eq!(described("(component)").kind, "component");
        assert_eq!(kind(b"\x7fELF"), "unknown");
    }

    #[test]
    fn a_broken_module_is_read_as_far_as_it_goes() {
        let mut wasm = wat::parse_str(r#"(module (import "env" "magic" (func)) (func))"#).unwrap();
        wasm.truncate(wasm.len() - 3);
        let mut description = Description { kind: kind(&wasm), ..Description::default() };
        assert!(describe(&wasm, &mut description).is_err());
        assert_eq!(description.imports, ["env.magic"]);
    }
}
