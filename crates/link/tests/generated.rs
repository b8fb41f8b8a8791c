//! src/wire/generated.rs is what the protocol's description makes of itself.

use std::path::Path;

#[test]
fn the_generated_code_is_that_of_the_description() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let description = protox::compile([root.join("proto/link.proto")], [root.join("proto")]).unwrap();
    let out = tempfile::tempdir().unwrap();
    tonic_prost_build::configure()
        .build_transport(false)
        .codec_path("crate::wire::codec::LeanCodec")
        .emit_rerun_if_changed(false)
        .bytes(".fleet.link.v1.Answer")
        .btree_map(".")
        // It holds a token's secret.
        .skip_debug(["JoinRequest"])
        .out_dir(out.path())
        .compile_fds(description)
        .unwrap();
    let made = std::fs::read_to_string(out.path().join("fleet.link.v1.rs")).unwrap();
    let kept = root.join("src/wire/generated.rs");
    if std::env::var_os("FLEET_REGENERATE").is_some() {
        std::fs::write(&kept, &made).unwrap();
    }
    assert!(
        std::fs::read_to_string(&kept).unwrap_or_default() == made,
        "proto/link.proto has changed: FLEET_REGENERATE=1 cargo test -p fleet-link --test generated"
    );
}
