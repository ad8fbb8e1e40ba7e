//! The little of HTTP/1.1 and of server-sent events that demo and bench need, as pure parsers.
//!
//! Hand-written because the load tool shares its cores with the host that it measures: every microsecond it spends is taken from the figure. It reads
//! what our own gateway sends and refuses what it does not understand; it is no client for other servers.

use anyhow::{Context, Result, bail, ensure};

/// A response's head larger than this is no answer of ours.
const HEAD_BYTES_MAX: usize = 16 * 1024;
/// A line with a chunk's size, extensions included.
const CHUNK_LINE_BYTES_MAX: usize = 256;

/// The status line and the headers.
#[derive(Debug)]
pub struct Head {
    pub status: u16,
    text: String,
}

impl Head {
    /// The head at the start of `input` and its length, or `None` while it is incomplete.
    pub fn parse(input: &[u8]) -> Result<Option<(Head, usize)>> {
        let Some(end) = find(input, b"\r\n\r\n") else {
            ensure!(input.len() <= HEAD_BYTES_MAX, "the response's head is over {HEAD_BYTES_MAX} bytes");
            return Ok(None);
        };
        let text = std::str::from_utf8(&input[..end]).context("the response's head is not text")?.to_owned();
        let status = text.strip_prefix("HTTP/1.1 ").and_then(|rest| rest.get(..3)).and_then(|code| code.parse().ok());
        let status = status.with_context(|| format!("this is no HTTP/1.1 response: {:?}", text.lines().next()))?;
        Ok(Some((Head { status, text }, end + 4)))
    }

    /// A header's value, its name in any case.
    pub fn header(&self, name: &str) -> Option<&str> {
        self.text.lines().skip(1).find_map(|line| {
            let (key, value) = line.split_once(':')?;
            key.eq_ignore_ascii_case(name).then(|| value.trim())
        })
    }

    /// How its body is framed.
    pub fn body(&self) -> Result<Body> {
        if self.header("transfer-encoding").is_some_and(|v| v.eq_ignore_ascii_case("chunked")) {
            return Ok(Body::ChunkLine);
        }
        if matches!(self.status, 204 | 304) {
            return Ok(Body::Done);
        }
        let length = self.header("content-length").context("the response has neither a length nor chunks")?;
        match length.parse().context("the response's content-length is no number")? {
            0 => Ok(Body::Done),
            left => Ok(Body::Length { left }),
        }
    }
}

/// How far a response's body has been read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Body {
    /// So many bytes are to come.
    Length { left: usize },
    /// Between two chunks.
    ChunkLine,
    /// Inside a chunk; its closing CRLF is not counted.
    Chunk { left: usize },
    /// After the last chunk, before the empty line.
    Trailers,
    /// All read.
    Done,
}

impl Body {
    /// Moves what of `input` belongs to the body to `output`, without its framing. Returns how many bytes of `input` are used up.
    pub fn decode(&mut self, input: &[u8], output: &mut Vec<u8>) -> Result<usize> {
        let mut used = 0;
        loop {
            let rest = &input[used..];
            match *self {
                Body::Done => return Ok(used),
                Body::Length { left } => {
                    let taken = left.min(rest.len());
                    output.extend_from_slice(&rest[..taken]);
                    used += taken;
                    if taken < left {
                        *self = Body::Length { left: left - taken };
                        return Ok(used);
                    }
                    *self = Body::Done;
                }
                Body::ChunkLine => {
                    let Some(end) = line_end(rest)? else { return Ok(used) };
                    used += end + 2;
                    let left = chunk_size(&rest[..end])?;
                    *self = if left == 0 { Body::Trailers } else { Body::Chunk { left } };
                }
                Body::Chunk { left: 0 } => {
                    if rest.len() < 2 {
                        return Ok(used);
                    }
                    ensure!(&rest[..2] == b"\r\n", "a chunk is longer than its size says");
                    used += 2;
                    *self = Body::ChunkLine;
                }
                Body::Chunk { left } => {
                    let taken = left.min(rest.len());
                    output.extend_from_slice(&rest[..taken]);
                    used += taken;
                    *self = Body::Chunk { left: left - taken };
                    if taken < left {
                        return Ok(used);
                    }
                }
                Body::Trailers => {
                    let Some(end) = line_end(rest)? else { return Ok(used) };
                    used += end + 2;
                    if end == 0 {
                        *self = Body::Done;
                    }
                }
            }
        }
    }
}

fn line_end(input: &[u8]) -> Result<Option<usize>> {
    let end = find(input, b"\r\n");
    ensure!(end.unwrap_or(input.len()) <= CHUNK_LINE_BYTES_MAX, "a line between chunks is too long");
    Ok(end)
}

fn chunk_size(line: &[u8]) -> Result<usize> {
    let digits = line.split(|&byte| byte == b';').next().unwrap_or_default();
    let digits = std::str::from_utf8(digits).context("a chunk's size is not text")?.trim();
    usize::from_str_radix(digits, 16).with_context(|| format!("a chunk's size is {digits:?}"))
}

/// One server-sent event; a field that was not sent is empty.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Event<'a> {
    pub kind: &'a str,
    pub id: &'a str,
    /// One line: the gateway never sends more.
    pub data: &'a str,
}

impl Event<'_> {
    /// Whether it ends its turn.
    pub fn is_terminal(&self) -> bool {
        matches!(self.kind, "turn.completed" | "turn.failed" | "turn.cancelled")
    }
}

/// The length of the first complete block of `text`, its blank line included.
pub fn block(text: &[u8]) -> Option<usize> {
    find(text, b"\n\n").map(|end| end + 2)
}

/// The event in a block; `None` for a block of comments.
pub fn parse_event(block: &[u8]) -> Result<Option<Event<'_>>> {
    let text = std::str::from_utf8(block).context("an event is not UTF-8")?;
    let mut event = Event { kind: "", id: "", data: "" };
    let mut fields = 0;
    for line in text.lines().filter(|line| !line.is_empty() && !line.starts_with(':')) {
        let (name, value) = line.split_once(':').unwrap_or((line, ""));
        let value = value.strip_prefix(' ').unwrap_or(value);
        fields += 1;
        match name {
            "event" => event.kind = value,
            "id" => event.id = value,
            "data" if event.data.is_empty() => event.data = value,
            "data" => bail!("an event has two lines of data: {text:?}"),
            "retry" => fields -= 1,
            _ => bail!("an event has an unknown field: {text:?}"),
        }
    }
    Ok((fields > 0).then_some(event))
}

fn find(input: &[u8], what: &[u8]) -> Option<usize> {
    let first = what[0];
    let mut from = 0;
    while let Some(at) = input[from..].iter().position(|&byte| byte == first) {
        let at = from + at;
        if input[at..].starts_with(what) {
            return Some(at);
        }
        from = at + 1;
    }
    None
}

/// For tests: a response that carries each piece as a chunk.
#[cfg(test)]
pub fn chunked(pieces: &[&str]) -> Vec<u8> {
    let mut text = "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n".to_owned();
    for piece in pieces {
        text.push_str(&format!("{:x}\r\n{piece}\r\n", piece.len()));
    }
    text.push_str("0\r\n\r\n");
    text.into_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;

    const CHUNKED: &[u8] = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n\
        5\r\nhello\r\n1;ext=1\r\n \r\n00a\r\nbig\r\nworld\r\n0\r\nX-Trailer: 1\r\n\r\nHTTP/1.1";

    fn read(input: &[u8], step: usize) -> Result<(u16, Vec<u8>, usize)> {
        let (head, mut used) = Head::parse(input)?.context("no head")?;
        let mut body = head.body()?;
        let mut output = Vec::new();
        let mut available = used;
        while body != Body::Done {
            available = (available + step).min(input.len());
            let taken = body.decode(&input[used..available], &mut output)?;
            ensure!(taken > 0 || available < input.len() || body == Body::Done, "incomplete");
            used += taken;
        }
        Ok((head.status, output, used))
    }

    #[test]
    fn a_chunked_body_is_the_same_however_it_arrives() {
        for step in [1, 2, 3, 7, 1_000] {
            let (status, body, used) = read(CHUNKED, step).unwrap();
            assert_eq!((status, body.as_slice()), (200, b"hello big\r\nworld".as_slice()), "{step} bytes at once");
            assert_eq!(&CHUNKED[used..], b"HTTP/1.1", "the next response is left alone");
        }
    }

    #[test]
    fn a_body_with_a_length_ends_at_its_length() {
        let input = b"HTTP/1.1 202 Accepted\r\ncontent-length: 3\r\n\r\nabcHTTP/1.1 200 OK";
        for step in [1, 2, 100] {
            let (status, body, used) = read(input, step).unwrap();
            assert_eq!((status, body.as_slice(), used), (202, b"abc".as_slice(), 47));
        }
    }

    #[test]
    fn bodies_may_be_empty_or_absent() {
        assert_eq!(read(b"HTTP/1.1 204 No Content\r\n\r\n", 1).unwrap().0, 204);
        assert_eq!(read(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n", 1).unwrap().1, b"");
    }

    #[test]
    fn what_is_no_response_of_ours_is_refused() {
        for bad in [
            "HTTP/1.0 200 OK\r\n\r\n",
            "SSH-2.0-OpenSSH\r\n\r\n",
            "HTTP/1.1 200 OK\r\n\r\n",
            "HTTP/1.1 200 OK\r\ncontent-length: x\r\n\r\n",
            "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n",
            "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n1\r\nab\r\n",
        ] {
            assert!(read(bad.as_bytes(), 1_000).is_err(), "{bad:?}");
        }
        assert!(Head::parse(&[b'x'; HEAD_BYTES_MAX + 1]).is_err());
        assert!(Head::parse(b"HTTP/1.1 200 OK\r\ncontent-le").unwrap().is_none());
    }

    #[test]
    fn headers_are_found_in_any_case() {
        let (head, _) = Head::parse(CHUNKED).unwrap().unwrap();
        assert_eq!(head.header("content-type"), Some("text/event-stream"));
        assert_eq!(head.header("location"), None);
    }

    #[test]
    fn an_event_is_read_from_its_block() {
        let text = b": hello\n\nid: 1.2\nevent: output.delta\ndata: {\"text\":\"a: b\"}\n\nid: end\nevent: tu";
        let first = block(text).unwrap();
        assert_eq!(parse_event(&text[..first]).unwrap(), None, "a comment is no event");
        let rest = &text[first..];
        let second = block(rest).unwrap();
        let event = parse_event(&rest[..second]).unwrap().unwrap();
        assert_eq!(event, Event { kind: "output.delta", id: "1.2", data: r#"{"text":"a: b"}"# });
        assert!(!event.is_terminal());
        assert_eq!(block(&rest[second..]), None, "the third has not arrived yet");
        let end = parse_event(b"event:turn.failed\nid:end\n\n").unwrap().unwrap();
        assert!(end.is_terminal() && end.id == "end");
    }

    #[test]
    fn an_event_of_another_dialect_is_refused() {
        assert!(parse_event(b"data: a\ndata: b\n\n").is_err());
        assert!(parse_event(b"colour: red\n\n").is_err());
        assert!(parse_event(b"data: \xff\n\n").is_err());
    }
}
