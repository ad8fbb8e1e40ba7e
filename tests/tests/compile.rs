//! Compiling is done in a process of its own, within bounds: a module that is a bomb for a compiler is refused, by a code, while turns go on.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use reqwest::StatusCode;
use turnhouse_tests::{Client, TestHost, program};
use wasm_encoder::{
    BlockType, CodeSection, ExportKind, ExportSection, Function, FunctionSection, MemArg, MemArgTarget, MemorySection,
    MemoryType, Module, TypeSection, ValType,
};

/// A command with this `_start`.
fn command(start: Function) -> Vec<u8> {
    let mut types = TypeSection::new();
    types.ty().function([], []);
    let (mut functions, mut code) = (FunctionSection::new(), CodeSection::new());
    functions.function(0);
    code.function(&start);
    let mut memories = MemorySection::new();
    memories.memory(MemoryType { minimum: 1, maximum: None, memory64: false, shared: false, page_size_log2: None });
    let mut exports = ExportSection::new();
    exports.export("_start", ExportKind::Func, 0).export("memory", ExportKind::Memory, 0);
    let mut module = Module::new();
    module.section(&types).section(&functions).section(&memories).section(&exports).section(&code);
    module.finish()
}

/// Many values that all live to the end, and many blocks that they live across: what register allocation likes least.
fn huge_function() -> Function {
    const LOCALS: u32 = 20_000;
    let mut body = Function::new([(LOCALS, ValType::I64)]);
    let mut code = body.instructions();
    for n in 0..LOCALS {
        code.local_get((n * 7) % LOCALS).i64_const(i64::from(n)).i64_add().local_set(n);
        code.block(BlockType::Empty)
            .local_get(n)
            .i32_wrap_i64()
            .br_if(0)
            .local_get(n)
            .local_set((n * 13) % LOCALS)
            .end();
    }
    for n in 0..LOCALS {
        code.i32_const(0).local_get(n).i64_store(MemArg {
            offset: 0,
            align: 3,
            target: MemArgTarget::Memory(0),
            ordering: None,
        });
    }
    code.end();
    body
}

fn br_table(entries: usize) -> Function {
    let mut body = Function::new([]);
    let mut code = body.instructions();
    for _ in 0..1_000 {
        code.block(BlockType::Empty);
    }
    code.i32_const(1).br_table((0..entries as u32).map(|n| n % 1_000), 0);
    for _ in 0..1_000 {
        code.end();
    }
    code.end();
    body
}

async fn host() -> TestHost {
    TestHost::start_with(|config| {
        config.compiler = Some(program::path().to_owned());
        config.limits.compile_timeout_ms = 20_000;
        config.limits.compile_memory_bytes_max = 512 << 20;
    })
    .await
}

/// Says `hi` again and again until told to stop; how often it was answered.
async fn neighbour(ann: Client, stop: Arc<AtomicBool>) -> u32 {
    let mut answered = 0;
    while !stop.load(Ordering::Relaxed) {
        assert_eq!(ann.say("echo", "c-1", "hi").await.completed().await, "hi");
        answered += 1;
    }
    answered
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_bomb_for_the_compiler_is_refused_by_a_code_while_turns_go_on() {
    let host = host().await;
    let ann = host.member("acme", "ann", "admin").await;
    let mallory = host.member("evil", "mallory", "admin").await;
    ann.deploy("echo").await;
    let stop = Arc::new(AtomicBool::new(false));
    let beside = tokio::spawn(neighbour(ann.clone(), stop.clone()));
    let (status, body) = mallory.upload("huge-function", command(huge_function())).await;
    stop.store(true, Ordering::Relaxed);
    let answered = beside.await.expect("the neighbour's turns complete");
    assert_eq!(status, StatusCode::UNPROCESSABLE_ENTITY, "{body}");
    let code = body["code"].as_str().unwrap_or_default();
    assert!(["module_too_complex", "compile_timeout"].contains(&code), "{body}");
    println!("{code} ({}); the neighbour had {answered} turns meanwhile", body["detail"]);
    assert!(answered > 0, "nobody else was served");
    // Nothing of it is left.
    assert_eq!(mallory.get("/v1/workers").await.1["items"].as_array().map(Vec::len), Some(0));
    assert_eq!(ann.say("echo", "c-1", "still here").await.completed().await, "still here");
    host.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_table_of_a_million_branches_costs_no_more_than_the_bounds() {
    let host = host().await;
    let ann = host.member("acme", "ann", "admin").await;
    let (status, body) = ann.upload("branches", command(br_table(1_000_000))).await;
    let code = body["code"].as_str().unwrap_or_default();
    assert!(
        status == StatusCode::CREATED || ["module_too_complex", "compile_timeout"].contains(&code),
        "{status} {body}"
    );
    host.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_compiled_apart_runs_and_is_kept() {
    let host = host().await;
    let ann = host.member("acme", "ann", "admin").await;
    for guest in ["echo", "notes"] {
        ann.deploy(guest).await;
        assert!(!ann.say(guest, "c-1", "hi").await.completed().await.is_empty());
    }
    let cached = std::fs::read_dir(host.data_dir().join("modules")).expect("the cache").count();
    assert_eq!(cached, 2);
    host.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_was_compiled_already_is_refused_by_name() {
    let host = host().await;
    let ann = host.member("acme", "ann", "admin").await;
    let (status, body) = ann.upload("native", b"\x7fELF\x02\x01\x01\0 and so on".to_vec()).await;
    assert_eq!((status.as_u16(), body["code"].as_str()), (422, Some("module_invalid")), "{body}");
    assert!(body["detail"].as_str().is_some_and(|text| text.contains("compiled already")), "{body}");
    host.stop().await;
}
