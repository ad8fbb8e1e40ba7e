//! `turnhouse compile-module`: what a host starts for each module that it compiles. Not for people.

use std::io::{stdin, stdout};

use anyhow::Context as _;

use super::Result;

const EXAMPLES: &str = "\
Example:
  turnhouse compile-module

A host starts it by itself, with a module on its standard input.";

/// Compile a module for the host that started this process
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub struct Args {}

/// Runs it.
pub fn run(_args: Args) -> Result {
    turnhouse::sandbox::compiler::serve(&mut stdin().lock(), &mut stdout().lock()).context("cannot compile")?;
    Ok(())
}
