//! Modules that are refused at upload, each under its code, and those that are large and run all the same.

use std::time::{Duration, Instant};

use reqwest::{Method, StatusCode};
use turnhouse_workers::made;

use crate::arena::{Arena, Hostile, SHORT, neighbour};

/// Nothing here takes longer, unless it hangs.
const UPLOAD_MAX: Duration = Duration::from_secs(30);

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_module_of_another_kind_is_refused_under_its_code_and_none_of_it_runs() {
    let arena = Arena::open(SHORT).await;
    for (name, code) in [
        ("multi_memory", "module_invalid"),
        ("memory64", "module_invalid"),
        ("memory_shared", "module_invalid"),
        ("atomics", "module_invalid"),
        ("gc_types", "module_invalid"),
        ("gc_i31", "module_invalid"),
        ("function_references", "module_invalid"),
        ("exceptions", "module_invalid"),
        ("custom_page_size", "module_invalid"),
        ("component", "module_invalid"),
        ("no_memory", "module_not_command"),
        ("no_start", "module_not_command"),
        ("memory_not_a_memory", "module_not_command"),
        ("start_not_a_function", "module_not_command"),
        ("start_wrong_type", "module_not_command"),
        ("start_is_import", "module_not_command"),
        ("initialize_present", "module_not_command"),
        ("initialize_loops", "module_not_command"),
        ("memory_imported", "module_import_unknown"),
        ("import_wrong_type", "module_import_unknown"),
        ("unknown_import", "module_import_unknown"),
        ("unknown_import_module", "module_import_unknown"),
        ("memory_over_cap", "module_too_complex"),
        ("table_huge", "module_too_complex"),
    ] {
        let wasm = wat::parse_str(turnhouse_workers::wat(name)).expect("it is wat");
        refused(&arena, name, wasm, code).await;
    }
    arena.settled().await;
    arena.host.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_module_that_is_broken_or_too_large_is_refused_while_the_neighbour_goes_on() {
    let arena = Arena::open(SHORT).await;
    let stop = std::sync::Arc::default();
    let neighbour = tokio::spawn(neighbour(arena.ann.clone(), std::sync::Arc::clone(&stop)));
    let echo = turnhouse_workers::bytes("echo");
    for cut in [0, 1, 7, 8, 9, echo.len() / 3, echo.len() / 2, echo.len() - 1] {
        refused(&arena, "truncated", echo[..cut].to_vec(), "module_").await;
    }
    let cases = [
        ("hundred_thousand_functions", made::with_functions(100_000), "module_too_complex"),
        ("too_many_types", made::with_types(1_000_000), "module_too_complex"),
        ("too_many_imports", made::with_imports(500_000), "module_too_complex"),
        ("too_many_exports", made::with_exports(1_000_000), "module_too_complex"),
        ("a_function_of_8_mib", made::with_long_start(8 << 20), "module_invalid"),
    ];
    for (name, wasm, code) in cases {
        refused(&arena, name, wasm, code).await;
    }
    // Refused by its length; a client that is still sending may find the connection closed before it reads why.
    let hundred_mib = made::with_custom_section(100 << 20);
    let request = arena.mallory.request(Method::PUT, "/v1/workers/hundred_mib");
    if let Ok(response) = request.header("content-type", "application/wasm").body(hundred_mib).send().await {
        assert_eq!(response.status(), StatusCode::PAYLOAD_TOO_LARGE);
    }
    assert_eq!(arena.mallory.get("/v1/workers/hundred_mib").await.0, StatusCode::NOT_FOUND);
    stop.store(true, std::sync::atomic::Ordering::Relaxed);
    neighbour.await.expect("every turn of the neighbour is answered");
    arena.settled().await;
    arena.host.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_module_that_is_only_large_is_a_worker_like_any_other() {
    let arena = Arena::open(SHORT).await;
    arena.deploy_bytes("data_20_mib", made::with_data(20 << 20)).await;
    arena.deploy_bytes("nested_blocks", made::with_nested_blocks(20_000)).await;
    arena.deploy_bytes("functions", made::with_functions(10_000)).await;
    arena.deploy_bytes("custom_section", made::with_custom_section(20 << 20)).await;
    arena
        .run_deployed(&[
            Hostile::new("data_20_mib", "go", "no_reply"),
            Hostile::new("nested_blocks", "go", "no_reply"),
            Hostile::new("functions", "go", "no_reply"),
            Hostile::new("custom_section", "go", "no_reply"),
        ])
        .await;
}

async fn refused(arena: &Arena, name: &str, wasm: Vec<u8>, code: &str) {
    let begun = Instant::now();
    let (got, problem) = arena.mallory.upload(name, wasm).await;
    assert_eq!(got, StatusCode::UNPROCESSABLE_ENTITY, "{name}: {problem}");
    let its_code = problem["code"].as_str().expect("a code");
    assert!(its_code.starts_with(code), "{name}: {problem}");
    assert!(problem["detail"].as_str().is_some_and(|detail| !detail.is_empty() && detail.len() < 1_000), "{problem}");
    assert!(begun.elapsed() < UPLOAD_MAX, "{name}: {:?}", begun.elapsed());
    println!("{name:<28} {its_code:<24} {:>8.1} ms", begun.elapsed().as_secs_f64() * 1_000.0);
}
