//! Replies with its message. A plain worker: the message is on standard input, what goes to standard output is the reply, no SDK.

use std::io;

fn main() -> io::Result<()> {
    io::copy(&mut io::stdin().lock(), &mut io::stdout().lock())?;
    Ok(())
}
