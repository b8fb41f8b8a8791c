//! src/etcd/generated.rs is what the description of etcd's API makes of itself.

use std::path::Path;

#[test]
fn the_generated_code_is_that_of_the_description() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let description = protox::compile([root.join("proto/etcd.proto")], [root.join("proto")]).unwrap();
    let out = tempfile::tempdir().unwrap();
    tonic_prost_build::configure()
        .build_server(false)
        .build_transport(false)
        .emit_rerun_if_changed(false)
        .bytes(".")
        // They hold a password and what it is exchanged for.
        .skip_debug(["AuthenticateRequest", "AuthenticateResponse"])
        .out_dir(out.path())
        .compile_fds(description)
        .unwrap();
    let made = std::fs::read_to_string(out.path().join("etcdserverpb.rs")).unwrap();
    let kept = root.join("src/etcd/generated.rs");
    if std::env::var_os("FLEET_REGENERATE").is_some() {
        std::fs::write(&kept, &made).unwrap();
    }
    assert!(
        std::fs::read_to_string(&kept).unwrap_or_default() == made,
        "proto/etcd.proto has changed: FLEET_REGENERATE=1 cargo test -p fleet-registry --test generated"
    );
}
