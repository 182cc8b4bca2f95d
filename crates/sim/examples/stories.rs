//! Tells the stories of many seeds, one after the other: `stories FIRST LAST`. Fails when one goes wrong.

use std::process::ExitCode;
use std::time::Instant;

fn main() -> ExitCode {
    let filter = tracing_subscriber::EnvFilter::from_default_env();
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).init();
    let mut seeds = std::env::args().skip(1).map(|word| word.parse::<u64>().expect("a seed is a number"));
    let first = seeds.next().unwrap_or(1);
    let last = seeds.next().unwrap_or(first);
    let mut wrong = Vec::new();
    for seed in first..=last {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build();
        let began = Instant::now();
        match runtime.expect("a runtime").block_on(berth_sim::story::tell(seed)) {
            Ok(told) => println!("seed {seed}: good after {:.1?}: {told:?}", began.elapsed()),
            Err(how) => {
                println!("{how}");
                wrong.push(seed);
            }
        }
    }
    if wrong.is_empty() {
        return ExitCode::SUCCESS;
    }
    println!("went wrong: {wrong:?}");
    ExitCode::FAILURE
}
