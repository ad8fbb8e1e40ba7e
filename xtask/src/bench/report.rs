//! What the bench found: figures with their runs and goals, as a table, as JSON, and the ratios of the whole to its parts. Pure.

use std::fmt::Write as _;

use serde_json::{Value, json};

/// A figure that the project has promised.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Goal {
    AtLeast(f64),
    AtMost(f64),
}

impl Goal {
    fn met(self, value: f64) -> bool {
        match self {
            Goal::AtLeast(bound) => value >= bound,
            Goal::AtMost(bound) => value <= bound,
        }
    }

    fn text(self) -> String {
        match self {
            Goal::AtLeast(bound) => format!("≥ {}", number(bound)),
            Goal::AtMost(bound) => format!("≤ {}", number(bound)),
        }
    }
}

/// One figure, measured some times.
#[derive(Debug, Clone)]
pub struct Figure {
    pub row: String,
    pub name: &'static str,
    pub unit: &'static str,
    pub runs: Vec<f64>,
    pub goal: Option<Goal>,
}

impl Figure {
    /// The one that stands for all its runs.
    pub fn median(&self) -> f64 {
        let mut sorted = self.runs.clone();
        sorted.sort_by(f64::total_cmp);
        let middle = sorted.len() / 2;
        if sorted.len() % 2 == 1 { sorted[middle] } else { (sorted[middle - 1] + sorted[middle]) / 2.0 }
    }

    fn range(&self) -> (f64, f64) {
        self.runs.iter().fold((f64::INFINITY, 0.0), |(low, high), &run| (low.min(run), run.max(high)))
    }
}

/// Every figure, in the order of the first run of each.
#[derive(Debug, Default)]
pub struct Report {
    figures: Vec<Figure>,
    skipped: Vec<(String, String)>,
}

impl Report {
    /// Adds one run of a figure.
    pub fn add(&mut self, row: &str, name: &'static str, unit: &'static str, value: f64) {
        match self.figures.iter_mut().find(|figure| figure.row == row && figure.name == name) {
            Some(figure) => figure.runs.push(value),
            None => self.figures.push(Figure { row: row.to_owned(), name, unit, runs: vec![value], goal: None }),
        }
    }

    /// Says what a figure should be. Nothing if it was not measured.
    pub fn goal(&mut self, row: &str, name: &str, goal: Goal) {
        if let Some(figure) = self.figures.iter_mut().find(|figure| figure.row == row && figure.name == name) {
            figure.goal = Some(goal);
        }
    }

    /// Says that something could not be measured, and why. What was measured of it until then is forgotten.
    pub fn skip(&mut self, row: &str, reason: &str) {
        self.figures.retain(|figure| figure.row.strip_prefix(row).is_none_or(|rest| !rest.starts_with(',')));
        self.skipped.push((row.to_owned(), reason.to_owned()));
    }

    /// Names and reasons.
    pub fn skipped(&self) -> &[(String, String)] {
        &self.skipped
    }

    /// The median of a figure, if it was measured.
    pub fn median(&self, row: &str, name: &str) -> Option<f64> {
        self.figures.iter().find(|figure| figure.row == row && figure.name == name).map(Figure::median)
    }

    /// For people: Markdown, with columns that line up in a terminal too.
    pub fn table(&self) -> String {
        let mut lines = vec![["what", "figure", "median", "lowest … highest", "goal"].map(str::to_owned)];
        let mut last_row = "";
        for figure in &self.figures {
            let (low, high) = figure.range();
            let row = if figure.row == last_row { "" } else { &figure.row };
            last_row = &figure.row;
            let goal = figure.goal.map_or(String::new(), |goal| {
                format!("{} {}", goal.text(), if goal.met(figure.median()) { "met" } else { "MISSED" })
            });
            let range =
                if figure.runs.len() > 1 { format!("{} … {}", number(low), number(high)) } else { String::new() };
            let median = format!("{} {}", number(figure.median()), figure.unit);
            lines.push([row.to_owned(), figure.name.to_owned(), median, range, goal]);
        }
        columns(&lines)
    }

    /// For machines.
    pub fn json(&self) -> Value {
        let figures = self.figures.iter().map(|figure| {
            let (bound, met) = match figure.goal {
                Some(goal @ (Goal::AtLeast(bound) | Goal::AtMost(bound))) => {
                    (Some(bound), Some(goal.met(figure.median())))
                }
                None => (None, None),
            };
            json!({"row": figure.row, "figure": figure.name, "unit": figure.unit, "median": figure.median(),
                   "runs": figure.runs, "goal": bound, "goal_met": met})
        });
        Value::Array(figures.collect())
    }
}

/// Markdown with padded columns.
pub fn columns<const N: usize>(lines: &[[String; N]]) -> String {
    let widths: [usize; N] =
        std::array::from_fn(|at| lines.iter().map(|line| line[at].chars().count()).max().unwrap_or(0));
    let mut text = String::new();
    for (at, line) in lines.iter().enumerate() {
        for (cell, width) in line.iter().zip(widths) {
            write!(text, "| {cell:width$} ").expect("a string takes everything");
        }
        text.push_str("|\n");
        if at == 0 {
            for width in widths {
                write!(text, "|{}", "-".repeat(width + 2)).expect("a string takes everything");
            }
            text.push_str("|\n");
        }
    }
    text
}

/// Three significant digits or a whole number, thousands apart.
pub fn number(value: f64) -> String {
    if value.abs() < 100.0 {
        let digits = if value.abs() < 1.0 {
            3
        } else if value.abs() < 10.0 {
            2
        } else {
            1
        };
        let text = format!("{value:.digits$}");
        return text.strip_suffix(".0").or(text.strip_suffix(".00")).unwrap_or(&text).to_owned();
    }
    let digits = format!("{value:.0}");
    let mut text = String::new();
    for (at, digit) in digits.chars().enumerate() {
        if at > 0 && (digits.len() - at) % 3 == 0 {
            text.push(' ');
        }
        text.push(digit);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report() -> Report {
        let mut report = Report::default();
        for run in [9_000.0, 7_000.0, 8_500.0] {
            report.add("echo, 64 clients", "rate", "turns/s", run);
        }
        report.add("echo, 64 clients", "p50", "ms", 4.25);
        report.goal("echo, 64 clients", "rate", Goal::AtLeast(8_000.0));
        report.goal("echo, 64 clients", "p50", Goal::AtMost(4.0));
        report
    }

    #[test]
    fn a_figure_is_its_median() {
        assert_eq!(report().median("echo, 64 clients", "rate"), Some(8_500.0));
        assert_eq!(report().median("echo", "rate"), None);
        let even = Figure { row: String::new(), name: "", unit: "", runs: vec![4.0, 1.0, 3.0, 2.0], goal: None };
        assert_eq!(even.median(), 2.5);
    }

    #[test]
    fn the_table_says_which_goals_are_met() {
        let table = report().table();
        let lines: Vec<&str> = table.lines().collect();
        assert!(lines[2].contains("8 500 turns/s") && lines[2].contains("7 000 … 9 000"), "{table}");
        assert!(lines[2].contains("≥ 8 000 met") && lines[3].contains("≤ 4 MISSED"), "{table}");
        assert!(lines[3].starts_with("|   "), "a row's name is said once: {table}");
    }

    #[test]
    fn json_has_every_run() {
        let json = report().json();
        assert_eq!(json[0]["runs"], json!([9_000.0, 7_000.0, 8_500.0]));
        assert_eq!((&json[0]["goal_met"], &json[1]["goal_met"]), (&json!(true), &json!(false)));
    }

    #[test]
    fn what_is_skipped_has_no_figures() {
        let mut report = report();
        report.skip("ech", "nothing of this name");
        assert!(report.median("echo, 64 clients", "rate").is_some());
        report.skip("echo", "no network");
        assert_eq!(report.median("echo, 64 clients", "rate"), None);
        assert_eq!(report.skipped()[1], ("echo".to_owned(), "no network".to_owned()));
    }

    #[test]
    fn numbers_are_short() {
        for (value, text) in
            [(0.62, "0.620"), (4.2, "4.20"), (52.04, "52"), (400.0, "400"), (14_300.4, "14 300"), (1e6, "1 000 000")]
        {
            assert_eq!(number(value), text);
        }
    }
}
