//! The imports as the host sees them: numbers, any numbers. For guests that pass what no SDK would.
#![allow(
    unsafe_code,
    reason = "declaring an import is an unsafe block. The functions are marked safe although the host writes where it is told to: the callers pass \
              addresses of their own buffers, or such as the host must refuse"
)]

/// Declares a module's imports; off wasm, where the guests are only checked, functions of the same names that refuse.
macro_rules! imports {
    ($module:literal { $($(#[$doc:meta])* fn $name:ident($($arg:ident),*);)* }) => {
        #[cfg(target_family = "wasm")]
        #[link(wasm_import_module = $module)]
        unsafe extern "C" {
            $($(#[$doc])* pub safe fn $name($($arg: i32),*) -> i32;)*
        }
        $(
            $(#[$doc])*
            #[cfg(not(target_family = "wasm"))]
            pub fn $name($($arg: i32),*) -> i32 {
                $(let _ = $arg;)*
                -52
            }
        )*
    };
}

/// The host's functions.
pub mod turnhouse {
    imports! {
        "turnhouse_v1" {
            fn abi_revision();
            fn input_read(ptr, cap);
            fn message_read(ptr, cap);
            fn snapshot_read(ptr, cap);
            fn snapshot_write(ptr, len);
            fn emit(kind_ptr, kind_len, ptr, len);
            fn reply(ptr, len);
            fn log(level, ptr, len);
            fn call(op_ptr, op_len, req_ptr, req_len);
            fn recv(handle, ptr, cap, timeout_ms);
            fn error_read(handle, ptr, cap);
            fn wait(handles_ptr, count, timeout_ms);
            fn close(handle);
            fn attachment_read(id_ptr, id_len, offset, ptr, cap);
        }
    }
}

/// The functions of WASI that a guest here misuses.
pub mod wasi {
    imports! {
        "wasi_snapshot_preview1" {
            fn args_get(argv, buffer);
            fn environ_get(environ, buffer);
            fn fd_close(fd);
            fn fd_prestat_get(fd, prestat);
            fn fd_read(fd, iovecs, count, read);
            fn fd_renumber(from, to);
            fn fd_write(fd, iovecs, count, written);
            fn path_symlink(old, old_len, fd, new, new_len);
            fn poll_oneoff(subscriptions, events, count, happened);
            fn random_get(ptr, len);
            fn sched_yield();
        }
    }
}

/// A slice as the two numbers that the host takes. On wasm32 an address has 32 bits; natively it is cut, and goes nowhere.
pub fn span(bytes: &[u8]) -> (i32, i32) {
    (address(bytes.as_ptr()), bytes.len() as i32)
}

/// An address as the number that the host takes.
pub fn address<T>(of: *const T) -> i32 {
    of.addr() as u32 as i32
}

/// The message, read by the host's function; at most 64 KiB of it.
pub fn message() -> String {
    let mut bytes = vec![0u8; 64 * 1024];
    let total = turnhouse::message_read(address(bytes.as_mut_ptr()), bytes.len() as i32);
    bytes.truncate(usize::try_from(total).unwrap_or(0));
    String::from_utf8_lossy(&bytes).into_owned()
}

/// Streams a text. What a guest here reports must reach the test also where the guest's other calls are refused.
pub fn say(text: &str) {
    let ((kind, kind_len), (ptr, len)) = (span(b"output.delta"), span(text.as_bytes()));
    let result = turnhouse::emit(kind, kind_len, ptr, len);
    assert_eq!(result, 0, "the host refused a delta");
}

/// The size of the guest's memory in bytes: the first address that is not in it.
pub fn memory_bytes() -> u64 {
    #[cfg(target_family = "wasm")]
    return core::arch::wasm32::memory_size::<0>() as u64 * 65_536;
    #[cfg(not(target_family = "wasm"))]
    return 0;
}
