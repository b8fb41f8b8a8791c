//! What the programs for libFuzzer share.

/// Runs the target of that name; a panic is what libFuzzer looks for.
pub fn run(name: &str, input: &[u8]) {
    let target = fleet_fuzz::target(name).expect("each program is named as its target");
    (target.run)(input);
}
