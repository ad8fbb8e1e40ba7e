//! The programs of `docs/clients.md`, run as they stand against a host: blocks of code whose first line says `run=NAME`.

use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use tokio::process::Command;
use tokio::time::timeout;

use crate::host::Host;
use crate::pypi::{Found, succeeds, toolchains_dir};
use crate::setup;

const PAGE: &str = "docs/clients.md";
const ENDS_WITHIN: Duration = Duration::from_secs(60);
/// Of npm, pinned.
const EVENTSOURCE: &str = "5.1.5";

/// A program of the page.
#[derive(Debug, PartialEq)]
struct Program<'a> {
    name: &'a str,
    language: &'a str,
    text: String,
}

/// Runs every program of the page. `python` has httpx.
pub async fn run(host: &Host, python: &Found<PathBuf>, scratch: &Path) -> Result<()> {
    let page = std::fs::read_to_string(setup::root().join(PAGE)).with_context(|| format!("there is no {PAGE}"))?;
    let programs = programs(&page)?;
    ensure!(programs.len() >= 4, "{PAGE} has lost its programs: {programs:?}");
    for program in &programs {
        let name = program.name;
        match command(program, python, scratch)? {
            Found::Here(command) => {
                said(command, host).await.with_context(|| format!("{PAGE}, {name}"))?;
                println!("{PAGE}, {name}: it says hello");
            }
            Found::Missing(why) => println!("skipped: {PAGE}, {name}: {why}"),
        }
    }
    Ok(())
}

/// The blocks that say `run=NAME` behind their language.
fn programs(page: &str) -> Result<Vec<Program<'_>>> {
    let (mut programs, mut lines) = (Vec::new(), page.lines());
    while let Some(line) = lines.next() {
        let Some((language, name)) = line.strip_prefix("```").and_then(|info| info.split_once(" run=")) else {
            continue;
        };
        let body: Vec<&str> = lines.by_ref().take_while(|line| *line != "```").collect();
        ensure!(!body.is_empty(), "the program {name} has no text");
        programs.push(Program { name, language, text: body.join("\n") + "\n" });
    }
    Ok(programs)
}

fn command(program: &Program<'_>, python: &Found<PathBuf>, scratch: &Path) -> Result<Found<Command>> {
    let directory = scratch.join(program.name);
    std::fs::create_dir_all(&directory)?;
    let write = |name: &str| -> Result<PathBuf> {
        let file = directory.join(name);
        std::fs::write(&file, &program.text)?;
        Ok(file)
    };
    let has = |tool: &str| succeeds(std::process::Command::new(tool).arg("--version"));
    let mut command = match program.language {
        "sh" if has("curl") => {
            let mut command = Command::new("sh");
            command.arg("-e").arg(write("client.sh")?);
            command
        }
        "sh" => return Ok(Found::Missing("there is no curl".to_owned())),
        "python" => match python {
            Found::Here(python) => {
                let mut command = Command::new(python);
                command.arg(write("client.py")?);
                command
            }
            Found::Missing(why) => return Ok(Found::Missing(why.clone())),
        },
        "js" if !has("node") => return Ok(Found::Missing("there is no node".to_owned())),
        "js" => {
            if program.text.contains("from \"eventsource\"") {
                match eventsource()? {
                    Found::Here(modules) => std::os::unix::fs::symlink(modules, directory.join("node_modules"))?,
                    Found::Missing(why) => return Ok(Found::Missing(why)),
                }
            }
            let mut command = Command::new("node");
            command.arg(write("client.mjs")?);
            command
        }
        other => bail!("nobody has said how {other} is run; say it in {}", file!()),
    };
    command.current_dir(&directory);
    Ok(Found::Here(command))
}

/// The `node_modules` with the package `eventsource`.
fn eventsource() -> Result<Found<PathBuf>> {
    let directory = toolchains_dir().join(format!("eventsource-{EVENTSOURCE}"));
    let modules = directory.join("node_modules");
    if modules.join("eventsource/package.json").is_file() {
        return Ok(Found::Here(modules));
    }
    std::fs::create_dir_all(&directory)?;
    let mut npm = std::process::Command::new("npm");
    npm.args(["install", "--ignore-scripts", "--no-audit", "--no-fund", "--loglevel=error", "--prefix"]);
    npm.arg(&directory).arg(format!("eventsource@{EVENTSOURCE}")).stdin(Stdio::null()).stdout(Stdio::null());
    match npm.status() {
        Ok(status) if status.success() => Ok(Found::Here(modules)),
        _ => Ok(Found::Missing(format!("npm could not bring eventsource {EVENTSOURCE} (its message is above)"))),
    }
}

/// It ends well, and what it prints has the reply.
async fn said(mut command: Command, host: &Host) -> Result<()> {
    command.env("TURNHOUSE_URL", &host.url).env("TURNHOUSE_API_KEY", &host.api_key);
    command.stdin(Stdio::null()).kill_on_drop(true);
    let output =
        timeout(ENDS_WITHIN, command.output()).await.context("it does not end")?.context("it cannot be run")?;
    let told = String::from_utf8_lossy(&output.stdout);
    let words: String = told.split_whitespace().collect();
    let complete = words.contains("turn.completed") && words.contains("\"reply\":{\"text\":\"hello\"}");
    ensure!(
        output.status.success() && complete,
        "expected it to print turn.completed with the reply, saw {}:\n{told}\n{}",
        output.status,
        String::from_utf8_lossy(&output.stderr)
    );
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn programs_are_the_blocks_that_say_so() {
        let page = "# A\n```sh\nno\n```\n```sh run=curl\none\n\ntwo\n```\ntext\n```js run=fetch\n```";
        assert!(programs(page).unwrap_err().to_string().contains("fetch"));
        let found = programs(&page[..page.find("text").unwrap()]).unwrap();
        assert_eq!(found, [Program { name: "curl", language: "sh", text: "one\n\ntwo\n".to_owned() }]);
    }

    #[test]
    fn the_page_has_a_program_for_each_client() {
        let page = std::fs::read_to_string(setup::root().join(PAGE)).unwrap();
        let names: Vec<String> = programs(&page).unwrap().iter().map(|program| program.name.to_owned()).collect();
        assert_eq!(names, ["curl", "httpx", "fetch", "eventsource"]);
    }
}
