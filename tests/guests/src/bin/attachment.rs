//! Counts the words of its message's attachments and of those of its history, a line each; `after MS`, if asked to. Asked to `read ID OFFSET LENGTH`,
//! it does that instead.

use std::io::{BufRead as _, BufReader, Read as _, Seek as _, SeekFrom};

use turnhouse_guest::{self as th, Message, Part, Turn, WorkerResult};

fn main() {
    th::run(|turn: Turn| match turn.text().split_whitespace().collect::<Vec<_>>()[..] {
        ["read", id, offset, length] => {
            let mut file = match turn.attachment(id) {
                Ok(file) => file,
                Err(error) => return Ok(turn.say(&error.to_string())?),
            };
            let mut bytes = vec![0; length.parse()?];
            file.seek(SeekFrom::Start(offset.parse()?))?;
            let read = file.read(&mut bytes)?;
            Ok(turn.say(&format!("{read} of {}: {}", file.size(), String::from_utf8_lossy(&bytes[..read])))?)
        }
        ["after", ms] => {
            let mut echo = turn.call("host.echo", &serde_json::json!({ "delay_ms": ms.parse::<u64>()? }))?;
            while echo.recv()?.is_some() {}
            count_all(&turn)
        }
        _ => count_all(&turn),
    });
}

fn count_all(turn: &Turn) -> WorkerResult {
    let input = turn.input()?;
    count(turn, &input.message)?;
    input.history.iter().try_for_each(|past| count(turn, &past.message))
}

fn count(turn: &Turn, message: &Message) -> WorkerResult {
    for part in &message.parts {
        let Part::Attachment { attachment_id, name, media_type, bytes } = part else { continue };
        let mut words = 0;
        for line in BufReader::with_capacity(100_000, turn.attachment(attachment_id)?).lines() {
            words += line?.split_whitespace().count();
        }
        let name = name.as_deref().unwrap_or("a file");
        turn.say(&format!("{name}: {media_type}, {bytes} bytes, {words} words\n"))?;
    }
    Ok(())
}
