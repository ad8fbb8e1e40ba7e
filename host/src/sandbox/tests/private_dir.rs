//! A guest's private directory, as hostile guests meet it: what only bytes by hand can ask for. What programs do is in the end-to-end suite.

use std::fs;
use std::path::Path;

use super::*;
use crate::sandbox::private_dir::Quota;

const QUOTA: Quota = Quota { bytes_max: 1_000, files_max: 5 };

fn opened(path: &Path) -> Option<PrivateDir> {
    Some(PrivateDir::open(path, QUOTA).unwrap())
}

/// A program with WASI's file functions, `$make`, which makes and opens the file `f` and answers its descriptor, `$say`, which writes an errno as two
/// digits, and 2 000 bytes at 4096 that the buffer at 32 names.
fn files(body: &str) -> String {
    format!(
        r#"(module
          (import "wasi_snapshot_preview1" "fd_write" (func $fd_write (param i32 i32 i32 i32) (result i32)))
          (import "wasi_snapshot_preview1" "fd_pwrite" (func $fd_pwrite (param i32 i32 i32 i64 i32) (result i32)))
          (import "wasi_snapshot_preview1" "fd_read" (func $fd_read (param i32 i32 i32 i32) (result i32)))
          (import "wasi_snapshot_preview1" "fd_pread" (func $fd_pread (param i32 i32 i32 i64 i32) (result i32)))
          (import "wasi_snapshot_preview1" "fd_seek" (func $fd_seek (param i32 i64 i32 i32) (result i32)))
          (import "wasi_snapshot_preview1" "fd_close" (func $fd_close (param i32) (result i32)))
          (import "wasi_snapshot_preview1" "fd_renumber" (func $fd_renumber (param i32 i32) (result i32)))
          (import "wasi_snapshot_preview1" "fd_allocate" (func $fd_allocate (param i32 i64 i64) (result i32)))
          (import "wasi_snapshot_preview1" "fd_fdstat_set_flags" (func $fd_fdstat_set_flags (param i32 i32) (result i32)))
          (import "wasi_snapshot_preview1" "fd_filestat_set_size" (func $fd_filestat_set_size (param i32 i64) (result i32)))
          (import "wasi_snapshot_preview1" "path_create_directory" (func $path_create_directory (param i32 i32 i32) (result i32)))
          (import "wasi_snapshot_preview1" "path_filestat_get" (func $path_filestat_get (param i32 i32 i32 i32 i32) (result i32)))
          (import "wasi_snapshot_preview1" "path_rename" (func $path_rename (param i32 i32 i32 i32 i32 i32) (result i32)))
          (import "wasi_snapshot_preview1" "path_symlink" (func $path_symlink (param i32 i32 i32 i32 i32) (result i32)))
          (import "wasi_snapshot_preview1" "path_open" (func $path_open (param i32 i32 i32 i32 i32 i64 i64 i32 i32) (result i32)))
          (memory (export "memory") 1)
          (data (i32.const 16) "f")
          (data (i32.const 18) "link/")
          (data (i32.const 32) "\00\10\00\00\d0\07\00\00")
          (data (i32.const 40) "\00\10\00\00\0a\00\00\00")
          (func $say (param $errno i32)
            (i32.store8 (i32.const 64) (i32.add (i32.const 48) (i32.div_u (local.get $errno) (i32.const 10))))
            (i32.store8 (i32.const 65) (i32.add (i32.const 48) (i32.rem_u (local.get $errno) (i32.const 10))))
            (i32.store8 (i32.const 66) (i32.const 32))
            (i32.store (i32.const 48) (i32.const 64))
            (i32.store (i32.const 52) (i32.const 3))
            (drop (call $fd_write (i32.const 1) (i32.const 48) (i32.const 1) (i32.const 56))))
          (func $make (result i32)
            (call $say (call $path_open (i32.const 3) (i32.const 0) (i32.const 16) (i32.const 1) (i32.const 1)
                                        (i64.const 0x42) (i64.const 0) (i32.const 0) (i32.const 72)))
            (i32.load (i32.const 72)))
          (func (export "_start") (local $fd i32) {body}))"#
    )
}

/// What the guest said, and what it left.
fn told(body: &str) -> (String, tempfile::TempDir) {
    let dir = tempfile::tempdir().unwrap();
    let ended = Turn { directory: opened(dir.path()), ..Turn::new() }.run(&files(body));
    (ended.text(), dir)
}

#[test]
fn a_write_over_the_quota_writes_nothing() {
    let (told, dir) = told(
        "(local.set $fd (call $make))
         (call $say (call $fd_write (local.get $fd) (i32.const 32) (i32.const 1) (i32.const 76)))
         (call $say (call $fd_write (local.get $fd) (i32.const 40) (i32.const 1) (i32.const 76)))
         (call $say (call $fd_pwrite (local.get $fd) (i32.const 40) (i32.const 1) (i64.const 990) (i32.const 76)))
         (call $say (call $fd_pwrite (local.get $fd) (i32.const 40) (i32.const 1) (i64.const 991) (i32.const 76)))",
    );
    assert_eq!(told, "00 19 00 00 19 ");
    assert_eq!(fs::metadata(dir.path().join("f")).unwrap().len(), 1_000);
}

#[test]
fn absurd_positions_sizes_and_buffers_are_refused() {
    let (told, dir) = told(
        "(local.set $fd (call $make))
         (call $say (call $fd_pwrite (local.get $fd) (i32.const 40) (i32.const 1) (i64.const -1) (i32.const 76)))
         (call $say (call $fd_pwrite (local.get $fd) (i32.const 40) (i32.const 1) (i64.const 0x7fffffffffffffff) (i32.const 76)))
         (call $say (call $fd_filestat_set_size (local.get $fd) (i64.const -1)))
         (call $say (call $fd_filestat_set_size (local.get $fd) (i64.const 1001)))
         (call $say (call $fd_seek (local.get $fd) (i64.const 0x7fffffffffffffff) (i32.const 0) (i32.const 80)))
         (call $say (call $fd_write (local.get $fd) (i32.const 40) (i32.const 1) (i32.const 76)))
         (call $say (call $fd_write (local.get $fd) (i32.const 40) (i32.const 1025) (i32.const 76)))
         (call $say (call $fd_read (local.get $fd) (i32.const 40) (i32.const -1) (i32.const 76)))
         (call $say (call $fd_pread (local.get $fd) (i32.const 40) (i32.const 1) (i64.const -1) (i32.const 76)))
         (call $say (call $fd_allocate (local.get $fd) (i64.const 0) (i64.const 10)))",
    );
    assert_eq!(told, "00 22 19 19 19 00 19 28 28 28 58 ");
    assert_eq!(fs::metadata(dir.path().join("f")).unwrap().len(), 0);
}

#[test]
fn pointers_out_of_the_memory_end_the_guest_and_nothing_else() {
    for call in [
        "(call $fd_write (local.get $fd) (i32.const -8) (i32.const 1) (i32.const 76))",
        "(call $fd_write (local.get $fd) (i32.const 40) (i32.const 1) (i32.const -4))",
        "(call $fd_write (local.get $fd) (i32.const 48) (i32.const 1) (i32.const 76))",
        "(call $fd_read (local.get $fd) (i32.const 48) (i32.const 1) (i32.const 76))",
        "(call $fd_read (local.get $fd) (i32.const 3) (i32.const 1) (i32.const 76))",
        "(call $path_create_directory (i32.const 3) (i32.const -2) (i32.const 9))",
        "(call $path_rename (i32.const 3) (i32.const 16) (i32.const 1) (i32.const 3) (i32.const -2) (i32.const 9))",
        "(call $path_open (i32.const 3) (i32.const 0) (i32.const -2) (i32.const 9) (i32.const 1)
                          (i64.const 0x42) (i64.const 0) (i32.const 0) (i32.const 72))",
        "(call $path_open (i32.const 3) (i32.const 0) (i32.const 16) (i32.const 1) (i32.const 0)
                          (i64.const 0x42) (i64.const 0) (i32.const 0) (i32.const -1))",
    ] {
        let dir = tempfile::tempdir().unwrap();
        let body = format!(
            "(local.set $fd (call $make)) (i32.store (i32.const 48) (i32.const 65530)) (i32.store (i32.const 52) (i32.const 100)) (drop {call})"
        );
        let ended = Turn { directory: opened(dir.path()), ..Turn::new() }.run(&files(&body));
        assert_eq!(ended.code(), FailureCode::WorkerTrapped, "{call}");
        assert!(fs::metadata(dir.path().join("f")).unwrap().len() <= 10, "{call}");
    }
}

#[test]
fn a_path_of_megabytes_is_refused_without_being_walked() {
    let (told, dir) = told(
        "(drop (memory.grow (i32.const 100)))
         (call $say (call $path_create_directory (i32.const 3) (i32.const 16) (i32.const 4097)))
         (call $say (call $path_filestat_get (i32.const 3) (i32.const 1) (i32.const 16) (i32.const 6000000) (i32.const 80)))
         (call $say (call $path_symlink (i32.const 16) (i32.const -1) (i32.const 3) (i32.const 16) (i32.const 1)))
         (call $say (call $path_open (i32.const 3) (i32.const 0) (i32.const 16) (i32.const 6000000) (i32.const 1)
                                     (i64.const 0x42) (i64.const 0) (i32.const 0) (i32.const 72)))",
    );
    assert_eq!(told, "37 37 37 37 ");
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
}

#[test]
fn a_descriptor_keeps_its_quota_under_another_number_and_with_other_flags() {
    let (told, dir) = told(
        "(local.set $fd (call $make))
         (call $say (call $fd_renumber (local.get $fd) (i32.const 2)))
         (call $say (call $fd_write (i32.const 2) (i32.const 32) (i32.const 1) (i32.const 76)))
         (call $say (call $fd_pwrite (i32.const 2) (i32.const 40) (i32.const 1) (i64.const 985) (i32.const 76)))
         (call $say (call $fd_fdstat_set_flags (i32.const 2) (i32.const 1)))
         (call $say (call $fd_pwrite (i32.const 2) (i32.const 40) (i32.const 1) (i64.const 0) (i32.const 76)))
         (call $say (call $fd_close (i32.const 2)))
         (call $say (call $fd_write (i32.const 2) (i32.const 40) (i32.const 1) (i32.const 76)))",
    );
    // Appended to, a file grows wherever it is written.
    assert_eq!(told, "00 00 19 00 00 19 00 08 ");
    assert_eq!(fs::metadata(dir.path().join("f")).unwrap().len(), 995);
}

#[test]
fn what_a_slash_at_its_end_makes_of_a_path_never_lowers_the_count_too_far() {
    let dir = tempfile::tempdir().unwrap();
    fs::create_dir(dir.path().join("target")).unwrap();
    fs::write(dir.path().join("target/big"), [0; 900]).unwrap();
    std::os::unix::fs::symlink("target", dir.path().join("link")).unwrap();
    // A file onto `link/`: one call looks at the directory behind it, the other at the link.
    let body = "(local.set $fd (call $make))
         (drop (call $path_rename (i32.const 3) (i32.const 16) (i32.const 1) (i32.const 3) (i32.const 18) (i32.const 5)))
         (call $say (call $fd_filestat_set_size (local.get $fd) (i64.const 95)))";
    let ended = Turn { directory: opened(dir.path()), ..Turn::new() }.run(&files(body));
    assert_eq!(ended.text(), "00 19 ", "900 bytes, the link's 6, and 95");
    assert!(dir.path().join("target/big").exists());
}

/// A file operation that takes long: opening a pipe that nobody writes to. (No guest can make one.)
#[cfg(target_os = "linux")]
#[test]
fn a_guest_is_gone_only_once_its_file_operation_has_ended() {
    use rustix::fs::{CWD, FileType, Mode};

    let dir = tempfile::tempdir().unwrap();
    let pipe = dir.path().join("f");
    rustix::fs::mknodat(CWD, &pipe, FileType::Fifo, Mode::RWXU, 0).unwrap();
    let opens = files(
        "(call $say (i32.const 42))
         (drop (call $path_open (i32.const 3) (i32.const 0) (i32.const 16) (i32.const 1) (i32.const 0)
                                (i64.const 0x02) (i64.const 0) (i32.const 0) (i32.const 72)))",
    );
    let ended = Arc::new(std::sync::atomic::AtomicBool::new(false));
    let turn = Turn { directory: opened(dir.path()), ..Turn::new() };
    let ends = turn.run_while(&opens, |control| {
        std::thread::sleep(Duration::from_millis(100));
        control.stop(Stop::Ended);
        let ended = ended.clone();
        std::thread::spawn(move || {
            std::thread::sleep(Duration::from_millis(100));
            ended.store(true, Ordering::Release);
            // Whoever opens its other end lets it go on.
            fs::OpenOptions::new().write(true).open(pipe).unwrap();
        });
    });
    assert!(ended.load(Ordering::Acquire), "the operation was still going on");
    assert_eq!(ends.deltas(), ["42 "]);
    assert!(ends.finished.reply.is_err());
}

#[test]
fn a_guest_without_a_directory_has_no_descriptor_for_one() {
    let ended = Turn::new().run(&files(
        "(drop (call $make))
         (call $say (call $path_create_directory (i32.const 3) (i32.const 16) (i32.const 1)))
         (call $say (call $fd_write (i32.const 3) (i32.const 40) (i32.const 1) (i32.const 76)))",
    ));
    assert_eq!(ended.text(), "08 08 08 ");
}
