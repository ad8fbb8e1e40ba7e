//! `turnhouse new`: a worker to start from, with its test. Writes files and does nothing else.

use std::path::{Path, PathBuf};

use anyhow::Context as _;
use serde_json::json;

use super::output::Output;
use super::{CliError, Result};

const EXAMPLES: &str = "\
Examples:
  turnhouse new greeter
  turnhouse new greeter --sdk ../turnhouse/guest-sdk";

/// Make a worker to start from
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub struct Args {
    /// The worker's name: the directory that is made, or a path whose last part is the name
    name: PathBuf,

    /// The language
    #[arg(long, value_enum, default_value_t = Language::Rust)]
    lang: Language,

    /// Where the crate `turnhouse-guest` lies; from its repository when not given
    #[arg(long, value_name = "PATH")]
    sdk: Option<PathBuf>,
}

/// Languages that there is a template for.
#[derive(Debug, Clone, Copy, clap::ValueEnum)]
enum Language {
    /// With the guest SDK
    Rust,
}

/// The files of a Rust worker: where each goes and its template.
const RUST: &[(&str, &str)] = &[
    ("Cargo.toml", include_str!("../templates/rust/Cargo.toml.txt")),
    ("src/main.rs", include_str!("../templates/rust/main.rs.txt")),
    (".cargo/config.toml", include_str!("../templates/rust/config.toml.txt")),
    ("README.md", include_str!("../templates/rust/README.md.txt")),
    (".gitignore", include_str!("../templates/rust/gitignore.txt")),
];

const REPOSITORY: &str = env!("CARGO_PKG_REPOSITORY");

/// Runs it.
pub fn run(args: Args, output: Output) -> Result {
    let Language::Rust = args.lang;
    let name = crate_name(&args.name)?;
    let sdk = dependency(args.sdk.as_deref())?;
    let files = render(name, &sdk);
    let directory = &args.name;
    std::fs::create_dir(directory).map_err(|error| match error.kind() {
        std::io::ErrorKind::AlreadyExists => CliError::usage(format!("{} exists already", directory.display()))
            .help("choose another name; nothing was written"),
        _ => CliError::failed(format!("cannot make {}: {error}", directory.display())),
    })?;
    for (path, text) in &files {
        let path = directory.join(path);
        let parent = path.parent().context("every file has a directory")?;
        std::fs::create_dir_all(parent).with_context(|| format!("cannot make {}", parent.display()))?;
        std::fs::write(&path, text).with_context(|| format!("cannot write {}", path.display()))?;
    }
    if output.json {
        let files: Vec<&str> = files.iter().map(|(path, _)| *path).collect();
        output.json(&json!({"name": name, "directory": directory, "files": files}));
    } else {
        output.say(&format!("made {}. Next:", directory.display()));
        output.say(&format!("  cd {}", directory.display()));
        output.say("  rustup target add wasm32-wasip1   # once");
        output.say("  cargo test");
        output.say("  cargo worker");
        output.say(&format!("  turnhouse run target/wasm32-wasip1/release/{name}.wasm --message hello"));
    }
    Ok(())
}

/// The last part of the path, if a crate and a worker can bear that name.
fn crate_name(path: &Path) -> Result<&str> {
    // What cargo refuses as the name of a program: keywords and crates that it would hide.
    const TAKEN: &[&str] = &[
        "abstract",
        "alloc",
        "as",
        "async",
        "await",
        "become",
        "box",
        "break",
        "const",
        "continue",
        "core",
        "crate",
        "do",
        "dyn",
        "else",
        "enum",
        "extern",
        "false",
        "final",
        "fn",
        "for",
        "gen",
        "if",
        "impl",
        "in",
        "let",
        "loop",
        "macro",
        "match",
        "mod",
        "move",
        "mut",
        "override",
        "priv",
        "proc-macro",
        "pub",
        "ref",
        "return",
        "self",
        "serde",
        "static",
        "std",
        "struct",
        "super",
        "test",
        "trait",
        "true",
        "try",
        "turnhouse-guest",
        "type",
        "typeof",
        "unsafe",
        "unsized",
        "use",
        "virtual",
        "where",
        "while",
        "yield",
        "build",
        "deps",
        "examples",
        "incremental",
    ];
    let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
    let fits = name.starts_with(|c: char| c.is_ascii_lowercase())
        && name.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || matches!(b, b'-' | b'_'))
        && name.len() <= 64;
    if !fits {
        return Err(CliError::usage(format!("{name:?} is no worker's name"))
            .help("use lower-case letters, digits, '-' and '_', a letter first, 64 at most"));
    }
    if TAKEN.contains(&name) {
        return Err(CliError::usage(format!("{name} cannot be a crate's name")).help("choose another name"));
    }
    Ok(name)
}

/// How the template names the SDK: it is on no registry.
fn dependency(sdk: Option<&Path>) -> Result<String> {
    let Some(sdk) = sdk else { return Ok(format!("git = {}", quoted(REPOSITORY))) };
    let absolute = sdk.canonicalize().ok().filter(|path| path.join("Cargo.toml").is_file());
    let absolute = absolute.ok_or_else(|| {
        CliError::usage(format!("{} holds no crate", sdk.display()))
            .help("--sdk names the directory of turnhouse-guest")
    })?;
    let path = absolute.to_str().context("the path of the SDK is not UTF-8")?;
    Ok(format!("path = {}", quoted(path)))
}

/// As a TOML string.
fn quoted(text: &str) -> String {
    // TOML's basic strings escape as JSON's do.
    serde_json::Value::from(text).to_string()
}

fn render(name: &str, sdk: &str) -> Vec<(&'static str, String)> {
    let fill =
        |text: &str| text.replace("{{name}}", name).replace("{{sdk}}", sdk).replace("{{repository}}", REPOSITORY);
    RUST.iter().map(|(path, text)| (*path, fill(text))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rust_worker_has_its_test_and_nothing_left_to_fill_in() {
        let files = render("greeter", "git = \"https://example.org\"");
        let names: Vec<&str> = files.iter().map(|(path, _)| *path).collect();
        assert_eq!(names, ["Cargo.toml", "src/main.rs", ".cargo/config.toml", "README.md", ".gitignore"]);
        assert!(files.iter().all(|(_, text)| !text.contains("{{")), "{files:?}");
        assert!(files[0].1.contains("name = \"greeter\"") && files[0].1.contains("{ git = \"https://example.org\" }"));
        assert!(files[1].1.contains("#[test]"));
        assert!(files[2].1.contains("-zstack-size=131072"));
    }

    #[test]
    fn names_that_no_crate_can_bear_are_refused() {
        for good in ["greeter", "a-b_2", "work/greeter"] {
            assert!(crate_name(Path::new(good)).is_ok(), "{good}");
        }
        for bad in ["", "..", "Greeter", "2nd", "a b", "a.b", "test", "fn", &"x".repeat(65)] {
            assert!(crate_name(Path::new(bad)).is_err(), "{bad}");
        }
    }

    #[test]
    fn an_existing_directory_is_left_alone() {
        let directory = tempfile::tempdir().unwrap();
        let name = directory.path().join("greeter");
        let args = || Args { name: name.clone(), lang: Language::Rust, sdk: None };
        run(args(), Output { json: false }).unwrap();
        std::fs::write(name.join("src/main.rs"), "mine").unwrap();
        assert!(run(args(), Output { json: false }).is_err());
        assert_eq!(std::fs::read_to_string(name.join("src/main.rs")).unwrap(), "mine");
    }

    #[test]
    fn the_sdk_is_named_by_its_absolute_path() {
        let directory = tempfile::tempdir().unwrap();
        assert!(dependency(Some(directory.path())).is_err());
        std::fs::write(directory.path().join("Cargo.toml"), "").unwrap();
        let path = dependency(Some(directory.path())).unwrap();
        assert!(path.starts_with("path = \"/"), "{path}");
        assert!(dependency(None).unwrap().starts_with("git = \"https://"));
    }
}
