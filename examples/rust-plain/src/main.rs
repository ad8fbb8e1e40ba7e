//! Remembers how many messages there were and the name that it was told. Its state is two lines, count and name, as in every other example:
//! each goes on where another left off.

mod host;

use std::process::ExitCode;

fn main() -> ExitCode {
    match turn() {
        Ok(()) => ExitCode::SUCCESS,
        // Standard error goes to the turn's log. The turn has failed, and the state stays as it was.
        Err(why) => {
            eprintln!("{why}");
            ExitCode::FAILURE
        }
    }
}

fn turn() -> Result<(), String> {
    let message = text(host::message().map_err(|errno| format!("cannot read the message: {errno}"))?)?;
    let (mut count, mut name) = match host::state().map_err(|errno| format!("cannot read the state: {errno}"))? {
        Some(state) => parse(&text(state)?).ok_or("the state is not two lines, count and name")?,
        None => (0, String::new()),
    };
    count += 1;
    let answer = if let Some(told) = message.strip_prefix("my name is ") {
        // A name is one line of the state.
        name = told.split('\n').next().unwrap_or_default().to_owned();
        format!("Hello {name}, this is message {count}.")
    } else if message != "what is my name?" {
        format!("You said: {message}; this is message {count}.")
    } else if name.is_empty() {
        format!("I do not know your name; this is message {count}.")
    } else {
        format!("You are {name}; this is message {count}.")
    };
    host::save(format!("{count}\n{name}\n").as_bytes()).map_err(|errno| format!("cannot save the state: {errno}"))?;
    host::say(&answer).map_err(|errno| format!("cannot reply: {errno}"))
}

fn parse(state: &str) -> Option<(u64, String)> {
    let mut lines = state.split('\n');
    Some((lines.next()?.parse().ok()?, lines.next()?.to_owned()))
}

fn text(bytes: Vec<u8>) -> Result<String, String> {
    String::from_utf8(bytes).map_err(|_| "what the host gave is no UTF-8".to_owned())
}
