//! Does to its private directory what the message says, a line each, and replies with a line each: what came of it, or `errno <number>`.

use std::fs::{self, File};
use std::io::{Error, Read as _, Seek as _, SeekFrom, Write as _};

use turnhouse_test_guests::raw::{span, wasi};

const PREOPENED: i32 = 3;

fn main() {
    let message = std::io::read_to_string(std::io::stdin()).expect("a message");
    let mut held: Vec<File> = Vec::new();
    for line in message.lines() {
        let words: Vec<&str> = line.split(' ').collect();
        match done(&words, &mut held) {
            Ok(answer) => println!("{answer}"),
            Err(error) => println!("errno {}", error.raw_os_error().unwrap_or(-1)),
        }
    }
}

fn done(words: &[&str], held: &mut Vec<File>) -> Result<String, Error> {
    let ok = |()| "ok".to_owned();
    match *words {
        ["write", name, text] => fs::write(name, text).map(ok),
        ["append", name, text] => {
            File::options().append(true).create(true).open(name)?.write_all(text.as_bytes()).map(ok)
        }
        ["read", name] => fs::read_to_string(name),
        // In one piece, as a program writes that has it all in memory.
        ["fill", name, bytes] => fs::write(name, vec![b'x'; number(bytes) as usize]).map(ok),
        ["length", name] => fs::read(name).map(|bytes| bytes.len().to_string()),
        // Over what is there, from a place on.
        ["overwrite", name, at, bytes] => {
            let mut file = File::options().write(true).open(name)?;
            file.seek(SeekFrom::Start(number(at)))?;
            file.write_all(&vec![b'y'; number(bytes) as usize]).map(ok)
        }
        ["size", name, bytes] => File::options().write(true).open(name)?.set_len(number(bytes)).map(ok),
        ["remove", name] => fs::remove_file(name).map(ok),
        ["mkdir", name] => fs::create_dir(name).map(ok),
        ["rmdir", name] => fs::remove_dir(name).map(ok),
        ["rename", from, to] => fs::rename(from, to).map(ok),
        ["link", from, to] => fs::hard_link(from, to).map(ok),
        ["symlink", target, name] => match symlink(target, name) {
            0 => Ok("ok".to_owned()),
            errno => Err(Error::from_raw_os_error(errno)),
        },
        ["list"] => {
            let names = fs::read_dir("/")?.map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()));
            let mut names = names.collect::<Result<Vec<_>, Error>>()?;
            names.sort();
            Ok(format!("[{}]", names.join(" ")))
        }
        // Opens a file, and keeps it open to the end of the turn.
        ["hold", name] => {
            held.push(File::options().read(true).write(true).open(name)?);
            Ok("ok".to_owned())
        }
        // Writes to the file that was held last; reads it from its start.
        ["grow", bytes] => held.last_mut().expect("a held file").write_all(&vec![b'z'; number(bytes) as usize]).map(ok),
        ["look"] => {
            let (mut text, file) = (String::new(), held.last_mut().expect("a held file"));
            file.rewind()?;
            file.read_to_string(&mut text).map(|_| text)
        }
        ["close"] => {
            drop(held.pop());
            Ok("ok".to_owned())
        }
        // So many files, or as many of them as may be.
        ["files", count] => {
            for made in 0..number(count) {
                if let Err(error) = File::create(format!("f{made}")) {
                    return Ok(format!("{made} then {}", error.raw_os_error().unwrap_or(-1)));
                }
            }
            Ok("ok".to_owned())
        }
        // Directories in each other, by relative paths that stay short.
        ["deep", count] => {
            let mut path = String::new();
            for _ in 0..number(count) {
                path.push_str("d/");
                fs::create_dir(&path)?;
            }
            Ok("ok".to_owned())
        }
        ["trap"] => std::process::abort(),
        // Appends for ever.
        ["scribble", name] => {
            let mut file = File::options().append(true).create(true).open(name)?;
            let mut round = 0_u64;
            loop {
                if round.is_multiple_of(1000) {
                    println!("{round}");
                }
                file.write_all(b"scribble ")?;
                round += 1;
            }
        }
        _ => panic!("no such command: {words:?}"),
    }
}

fn number(word: &str) -> u64 {
    word.parse().expect("a number")
}

fn symlink(target: &str, name: &str) -> i32 {
    let ((old, old_len), (new, new_len)) = (span(target.as_bytes()), span(name.as_bytes()));
    wasi::path_symlink(old, old_len, PREOPENED, new, new_len)
}
