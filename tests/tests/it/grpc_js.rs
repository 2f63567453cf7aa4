//! A client of another language's gRPC library, from its default settings: grpc-js over the daemon's Unix socket. (Python's is in
//! `shims/tests/test_plain_grpc.py`.)

use std::path::Path;
use std::process::Command;

use kvstore_tests::{TestDaemon, azure};

/// gRPC's libraries name the socket's path as the authority of a request, which HTTP/2 servers refuse.
#[tokio::test(flavor = "multi_thread")]
async fn grpc_js_calls_every_method_and_moves_a_block() {
    // Beside Azurite: both come from npm.
    let modules = azure::program().and_then(|program| Some(program.parent()?.parent()?.to_owned()));
    let Some(modules) = modules.filter(|modules| modules.join("@grpc/grpc-js").is_dir()) else {
        println!(
            "skipped: grpc-js is not installed; `make test` installs it beside Azurite, which KVSTORE_AZURITE names"
        );
        return;
    };
    let daemon = TestDaemon::start(&[]).await;
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut command = Command::new("node");
    command.arg(here.join("tests/grpc_js/every_method.js")).arg(&daemon.address).arg(here.join("../proto/proto"));
    command.env("NODE_PATH", modules);
    let output = tokio::task::spawn_blocking(move || command.output()).await.unwrap().unwrap();
    let said = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{said}");
    assert!(said.lines().filter(|line| line.contains(": OK")).count() >= 3, "{said}");
}
