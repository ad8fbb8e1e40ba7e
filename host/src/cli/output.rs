//! What every command prints with: JSON or a table on stdout, colour and progress only on a terminal.

use std::io::{IsTerminal, Write};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde::Serialize;
use serde_json::Value;

/// How data is printed.
#[derive(Debug, Clone, Copy)]
pub struct Output {
    /// For machines.
    pub json: bool,
}

impl Output {
    /// One JSON value, indented on a terminal, else one line.
    pub fn json<T: Serialize>(self, value: &T) {
        let text = if std::io::stdout().is_terminal() {
            serde_json::to_string_pretty(value)
        } else {
            serde_json::to_string(value)
        };
        line(&text.expect("what commands print serialises"));
    }

    /// One line for a person; nothing with `--json`.
    pub fn say(self, text: &str) {
        if !self.json {
            line(text);
        }
    }

    /// Something was done to something.
    pub fn done(self, what: &str, kind: &str, id: &str) {
        if self.json {
            self.json(&serde_json::json!({kind: id, what: true}))
        } else {
            line(&format!("{what} {kind} {id}"))
        }
    }

    /// A page of a list: as it came, or as a table of these columns (heading, JSON pointer).
    pub fn page(self, page: &Value, columns: &[(&str, &str)]) {
        if self.json {
            return self.json(page);
        }
        let items = page["items"].as_array().map(Vec::as_slice).unwrap_or_default();
        if items.is_empty() {
            return line("(none)");
        }
        line(table(items, columns).trim_end());
        if let Some(next) = page["next"].as_str() {
            note(&format!("there are more: --after {next}"));
        }
    }

    /// One resource: as it came, or as `name  value` lines.
    pub fn resource(self, resource: &Value) {
        if self.json {
            return self.json(resource);
        }
        let Some(fields) = resource.as_object() else { return line(&cell(resource)) };
        let fields: Vec<(&String, &Value)> = fields.iter().filter(|(name, _)| *name != "links").collect();
        let width = fields.iter().map(|(name, _)| name.len()).max().unwrap_or(0);
        for (name, value) in fields {
            line(&format!("{name:width$}  {}", printable(&cell(value))));
        }
    }
}

/// A line on stdout. When its reader has gone away (`| head`), there is nobody left to do anything for.
pub fn line(text: &str) {
    write(text.as_bytes());
    write(b"\n");
}

fn write(bytes: &[u8]) {
    let mut stdout = std::io::stdout().lock();
    if stdout.write_all(bytes).and_then(|()| stdout.flush()).is_err() {
        std::process::exit(1);
    }
}

/// A remark on stderr, dim on a terminal.
pub fn note(text: &str) {
    let style = Style::of(&std::io::stderr());
    let _ = writeln!(std::io::stderr().lock(), "{}", style.dim(&printable(text)));
}

fn cell(value: &Value) -> String {
    match value {
        Value::Null => "-".to_owned(),
        Value::String(text) => text.clone(),
        other => other.to_string(),
    }
}

/// Left-aligned columns, two spaces between them.
fn table(items: &[Value], columns: &[(&str, &str)]) -> String {
    let heading = columns.iter().map(|(heading, _)| (*heading).to_owned()).collect();
    let row = |item: &Value| -> Vec<String> {
        let cells = columns.iter().map(|(_, pointer)| printable(&cell(item.pointer(pointer).unwrap_or(&Value::Null))));
        cells.map(|text| text.replace('\n', " ")).collect()
    };
    let rows: Vec<Vec<String>> = std::iter::once(heading).chain(items.iter().map(row)).collect();
    let width = |column: usize| rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0);
    let widths: Vec<usize> = (0..columns.len()).map(width).collect();
    let mut text = String::new();
    for row in rows {
        let cells: Vec<String> = row.iter().zip(&widths).map(|(cell, width)| format!("{cell:width$}")).collect();
        text.push_str(cells.join("  ").trim_end());
        text.push('\n');
    }
    text
}

/// The text without what steers a terminal: control characters other than newline and tab, and the marks that reorder text.
pub fn printable(text: &str) -> String {
    let steers = |c: char| {
        (c.is_control() && c != '\n' && c != '\t') || matches!(c, '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
    };
    text.chars().map(|c| if steers(c) { '\u{fffd}' } else { c }).collect()
}

/// Colour, or none.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Style {
    colour: bool,
}

impl Style {
    /// Colour if the stream is a terminal that has not asked for none.
    pub fn of(stream: &impl IsTerminal) -> Style {
        let plain = std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty())
            || std::env::var_os("TERM").is_some_and(|term| term == "dumb");
        Style { colour: stream.is_terminal() && !plain }
    }

    /// None.
    #[cfg(test)]
    pub fn plain() -> Style {
        Style { colour: false }
    }

    pub fn dim(self, text: &str) -> String {
        self.wrap("2", text)
    }

    pub fn bold(self, text: &str) -> String {
        self.wrap("1", text)
    }

    pub fn red(self, text: &str) -> String {
        self.wrap("1;31", text)
    }

    fn wrap(self, code: &str, text: &str) -> String {
        if self.colour { format!("\u{1b}[{code}m{text}\u{1b}[0m") } else { text.to_owned() }
    }
}

/// A bar for so many bytes, on stderr if that is a terminal.
pub fn bytes_bar(label: &str, total: u64) -> ProgressBar {
    let target =
        if std::io::stderr().is_terminal() { ProgressDrawTarget::stderr() } else { ProgressDrawTarget::hidden() };
    let style = ProgressStyle::with_template("{msg} [{bar:30}] {bytes}/{total_bytes} {bytes_per_sec}")
        .expect("the template is well-formed")
        .progress_chars("=> ");
    ProgressBar::with_draw_target(Some(total), target).with_style(style).with_message(label.to_owned())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_table_has_a_heading_and_a_dash_where_nothing_is() {
        let items = [json!({"id": "a", "n": {"m": 3}}), json!({"id": "longer", "n": {}})];
        assert_eq!(table(&items, &[("ID", "/id"), ("M", "/n/m")]), "ID      M\na       3\nlonger  -\n");
    }

    #[test]
    fn what_steers_a_terminal_is_not_printed() {
        assert_eq!(printable("a\tb\nc\u{1b}[31m\r\u{9b}\u{202e}é"), "a\tb\nc\u{fffd}[31m\u{fffd}\u{fffd}\u{fffd}é");
    }
}
