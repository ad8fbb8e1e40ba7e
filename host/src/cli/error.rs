//! What a command tells a person when it fails: what happened, what to do, and an exit code. Never a backtrace, never a secret.

use std::process::ExitCode;

use super::output::{Style, printable};

/// Why a command failed.
#[derive(Debug)]
pub struct CliError {
    exit: Exit,
    what: String,
    help: Option<String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Exit {
    Failed = 1,
    Usage = 2,
}

impl CliError {
    /// It failed: exit code 1. `what` is a lowercase fragment.
    pub fn failed(what: impl Into<String>) -> CliError {
        CliError { exit: Exit::Failed, what: what.into(), help: None }
    }

    /// It was used wrongly: exit code 2.
    pub fn usage(what: impl Into<String>) -> CliError {
        CliError { exit: Exit::Usage, what: what.into(), help: None }
    }

    /// What to do about it.
    #[must_use]
    pub fn help(mut self, help: impl Into<String>) -> CliError {
        self.help = Some(help.into());
        self
    }

    /// Adds what was being done, in front.
    #[must_use]
    pub fn context(mut self, doing: impl std::fmt::Display) -> CliError {
        self.what = format!("{doing}: {}", self.what);
        self
    }

    /// What happened.
    pub fn what(&self) -> &str {
        &self.what
    }

    /// What to do about it; empty when nothing is known.
    pub fn advice(&self) -> &str {
        self.help.as_deref().unwrap_or_default()
    }

    /// On stderr.
    pub fn print(&self) {
        use std::io::Write as _;
        // Nothing more can be done when stderr is gone.
        let _ = writeln!(std::io::stderr().lock(), "{}", self.render(Style::of(&std::io::stderr())));
    }

    /// For [`std::process::exit`]'s caller.
    pub fn exit_code(&self) -> ExitCode {
        ExitCode::from(self.exit as u8)
    }

    /// Two lines at most: `error: …` and `  help: …`.
    pub fn render(&self, style: Style) -> String {
        // What a server or a worker wrote must not steer the terminal.
        let what = one_line(&self.what);
        let mut text = format!("{} {what}", style.red("error:"));
        if let Some(help) = self.help.as_deref().filter(|help| !help.is_empty()) {
            text.push_str(&format!("\n  {} {}", style.bold("help:"), one_line(help)));
        }
        text
    }
}

fn one_line(text: &str) -> String {
    printable(text).trim().replace('\n', "\n        ")
}

impl From<anyhow::Error> for CliError {
    /// The error and its causes in one line.
    fn from(error: anyhow::Error) -> CliError {
        CliError::failed(format!("{error:#}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_says_what_happened_and_what_to_do() {
        let error = CliError::usage("it is off").help("switch it on");
        assert_eq!(error.render(Style::plain()), "error: it is off\n  help: switch it on");
        assert_eq!(format!("{:?}", error.exit_code()), format!("{:?}", ExitCode::from(2)));
        assert_eq!(CliError::failed("no").render(Style::plain()), "error: no");
    }

    #[test]
    fn an_errors_causes_stand_in_one_line() {
        use anyhow::Context as _;
        let error = std::fs::read("/nonexistent/file").context("cannot read the module").unwrap_err();
        let text = CliError::from(error).render(Style::plain());
        assert!(text.starts_with("error: cannot read the module: ") && !text.contains('\n'), "{text}");
    }

    #[test]
    fn what_a_server_wrote_does_not_steer_the_terminal() {
        let error = CliError::failed("bad \u{1b}[2J thing").help("\u{1b}]0;title\u{7}");
        let text = error.render(Style::plain());
        assert!(!text.contains('\u{1b}') && !text.contains('\u{7}'), "{text:?}");
    }
}
