//! Tries to get out of its private directory, in every way that WASI has words for; replies with a line for each: the trick and whether it worked.

use std::fs;

use turnhouse_test_guests::raw::{span, wasi};

const PREOPENED: i32 = 3;

fn main() {
    let tell = |trick: &str, worked: bool| println!("{trick} {}", if worked { "worked" } else { "refused" });
    tell("write_here", fs::write("/mine", "mine").is_ok());
    tell("read_here", fs::read("/mine").is_ok_and(|bytes| bytes == b"mine"));
    tell("parent", fs::read_dir("/..").is_ok());
    tell("parent_twice", fs::read("/../../etc/passwd").is_ok());
    tell("parent_hidden", fs::create_dir("/sub").is_ok() && fs::read("/sub/../../etc/passwd").is_ok());
    tell("absolute", fs::read("/etc/passwd").is_ok());
    tell("dot_dot_write", fs::write("/../escaped", "x").is_ok());
    tell("rename_out", fs::rename("/mine", "/../escaped").is_ok());
    tell("hard_link_out", fs::hard_link("/../../etc/passwd", "/passwd").is_ok());
    tell("symlink_absolute", symlink("/etc/passwd", "absolute") && fs::read("/absolute").is_ok());
    tell("symlink_parent", symlink("../../../../etc/passwd", "upwards") && fs::read("/upwards").is_ok());
    tell("symlink_directory", symlink("..", "up") && fs::read_dir("/up").is_ok());
    tell("nul_in_name", fs::write("/a\0b", "x").is_ok());
}

fn symlink(target: &str, name: &str) -> bool {
    let ((old, old_len), (new, new_len)) = (span(target.as_bytes()), span(name.as_bytes()));
    wasi::path_symlink(old, old_len, PREOPENED, new, new_len) == 0
}
