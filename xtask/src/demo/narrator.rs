//! The demo's voice: what is printed, how it is wrapped and coloured. Colour only on a terminal.

use std::io::{IsTerminal, Write};
use std::time::{Duration, Instant};

const WIDTH: usize = 96;
const MARGIN: &str = "   ";
const BOLD: &str = "1";
const DIM: &str = "2";
const GREEN: &str = "32";
const RED: &str = "31";
const CYAN: &str = "36";

pub struct Narrator {
    colour: bool,
    step: usize,
    steps: usize,
    started: Instant,
    /// Who has not said anything yet.
    speaker: Option<String>,
    /// Of a line that is being streamed.
    column: usize,
    indent: usize,
}

impl Narrator {
    pub fn new(steps: usize) -> Narrator {
        let colour = std::io::stdout().is_terminal() && std::env::var_os("NO_COLOR").is_none();
        Narrator { colour, step: 0, steps, started: Instant::now(), speaker: None, column: 0, indent: 0 }
    }

    /// Begins a step: what happens now.
    pub fn step(&mut self, title: &str) {
        self.end_stream();
        self.step += 1;
        self.started = Instant::now();
        println!("\n{}", self.paint(BOLD, &format!("{}/{}  {title}", self.step, self.steps)));
    }

    /// One more sentence.
    pub fn note(&mut self, text: &str) {
        self.end_stream();
        for line in wrap(text, WIDTH - MARGIN.len()) {
            println!("{MARGIN}{}", self.paint(DIM, &line));
        }
    }

    /// Ends a step: what it has shown, and how long it took.
    pub fn proven(&mut self, text: &str) {
        self.end_stream();
        let mut lines = wrap(text, WIDTH - MARGIN.len() - 2).into_iter();
        println!("{MARGIN}{} {}", self.paint(GREEN, "✓"), lines.next().unwrap_or_default());
        for line in lines {
            println!("{MARGIN}  {line}");
        }
        println!("{MARGIN}  {}", self.paint(DIM, &format!("({})", seconds(self.started.elapsed()))));
    }

    /// Something that went wrong on purpose.
    pub fn blow(&mut self, text: &str) {
        self.end_stream();
        println!("{MARGIN}{} {}", self.paint(RED, "✗"), self.paint(RED, text));
    }

    /// What someone says, whole.
    pub fn says(&mut self, who: &str, text: &str) {
        self.begin_stream(who);
        self.piece(text);
        self.end_stream();
    }

    /// Someone is about to speak; [`Narrator::piece`] prints what they say as it arrives.
    pub fn begin_stream(&mut self, who: &str) {
        self.end_stream();
        self.speaker = Some(who.to_owned());
    }

    fn name_speaker(&mut self) {
        let Some(who) = self.speaker.take() else { return };
        let name = format!("{who:>6} > ");
        self.indent = MARGIN.len() + name.len();
        self.column = self.indent;
        self.print(&format!("{MARGIN}{}", self.paint(CYAN, &name)));
    }

    /// Goes on with what is being said.
    pub fn piece(&mut self, text: &str) {
        self.name_speaker();
        for word in text.split_inclusive([' ', '\n']) {
            if self.column + word.trim_end().len() > WIDTH {
                self.new_line();
            }
            // A space that would begin a line is left out.
            if !(word == " " && self.column == self.indent) {
                self.print(word.trim_end_matches('\n'));
            }
            self.column += word.chars().count();
            if word.ends_with('\n') {
                self.new_line();
            }
        }
    }

    fn new_line(&mut self) {
        self.print(&format!("\n{}", " ".repeat(self.indent)));
        self.column = self.indent;
    }

    fn end_stream(&mut self) {
        self.speaker = None;
        if self.column > 0 {
            println!();
            self.column = 0;
        }
    }

    fn print(&self, text: &str) {
        print!("{text}");
        // A closed pipe is noticed by the next println.
        std::io::stdout().flush().ok();
    }

    fn paint(&self, code: &str, text: &str) -> String {
        if self.colour { format!("\x1b[{code}m{text}\x1b[0m") } else { text.to_owned() }
    }
}

/// `0.4 s`, `12 ms`.
pub fn seconds(time: Duration) -> String {
    if time < Duration::from_millis(100) {
        format!("{} ms", time.as_millis())
    } else {
        format!("{:.1} s", time.as_secs_f64())
    }
}

fn wrap(text: &str, width: usize) -> Vec<String> {
    let mut lines = vec![String::new()];
    for word in text.split_whitespace() {
        let line = lines.last_mut().expect("one line at least");
        if line.is_empty() {
            line.push_str(word);
        } else if line.chars().count() + 1 + word.chars().count() <= width {
            line.push(' ');
            line.push_str(word);
        } else {
            lines.push(word.to_owned());
        }
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_broken_between_words() {
        assert_eq!(wrap("a bb ccc dddd", 6), ["a bb", "ccc", "dddd"]);
        assert_eq!(wrap("unbreakable", 3), ["unbreakable"]);
        assert_eq!(wrap("", 3), [""]);
    }

    #[test]
    fn short_times_are_milliseconds() {
        assert_eq!(seconds(Duration::from_millis(12)), "12 ms");
        assert_eq!(seconds(Duration::from_millis(1_260)), "1.3 s");
    }
}
