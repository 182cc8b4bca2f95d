//! Seeded stories: what may happen to a cluster happens to it, and it holds.
//!
//! `BERTH_SIM_SEED=7 cargo nextest run -p berth-sim --test story again` tells one again that went wrong;
//! `cargo run -p berth-sim --example stories -- 1 100` looks for such.

fn tell(seed: u64) {
    let filter = tracing_subscriber::EnvFilter::from_default_env();
    let _ = tracing_subscriber::fmt().with_env_filter(filter).with_test_writer().try_init();
    let runtime =
        tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().expect("runtime");
    match runtime.block_on(berth_sim::story::tell(seed)) {
        Ok(told) => println!("seed {seed}: {told:?}"),
        Err(wrong) => panic!("{wrong}"),
    }
}

#[test]
fn the_story_of_seed_1_ends_well() {
    tell(1);
}

#[test]
fn the_story_of_seed_2_ends_well() {
    tell(2);
}

#[test]
fn the_story_of_seed_3_ends_well() {
    tell(3);
}

#[test]
fn the_story_of_seed_4_ends_well() {
    tell(4);
}

/// Tells the story that the environment asks for, if it does.
#[test]
fn again() {
    if let Ok(seed) = std::env::var("BERTH_SIM_SEED") {
        tell(seed.parse().expect("a number"));
    }
}
