//! Any bytes, uploaded: a refusal with a code and a readable text, or a worker that runs to an outcome of its own.
#![no_main]

use libfuzzer_sys::fuzz_target;
use turnhouse::sandbox::ModuleRefusal;
use turnhouse_fuzz::{Begun, run, sandbox};

fn check(refusal: &ModuleRefusal) {
    let text = refusal.to_string();
    assert!(refusal.code().starts_with("module_"), "{refusal:?}");
    assert!(!text.is_empty() && text.len() < 2_000 && !text.contains(['\n', '\0', '\u{1b}']), "{refusal:?}");
}

fuzz_target!(|wasm: &[u8]| {
    let sandbox = sandbox();
    let inspected = sandbox.inspect(wasm);
    match sandbox.handle().block_on(sandbox.compile(wasm.to_vec().into())) {
        Ok(worker) => {
            let inspection = inspected.expect("what is compiled was inspected");
            assert_eq!((inspection.bytes, inspection.speaks), (wasm.len(), worker.speaks()));
            run(&worker, b"hello".to_vec(), Begun { shared: true, snapshot: true, dry_run: false, files: false });
        }
        Err(refusal) => {
            check(&refusal);
            if let Err(inspected) = inspected {
                assert_eq!(inspected, refusal, "inspected twice, the same is said");
            }
        }
    }
});
