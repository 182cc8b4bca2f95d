//! Prints how fast the SQLite store is on this machine's disk: acknowledged writes a second, and the time of a list.
//!
//! `cargo run --release -p berth-store --example store_rate [DIRECTORY]`; without a directory, a temporary one.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use berth_store::{Query, SqliteStore, Store, SystemClock};

const SPAN: Duration = Duration::from_secs(5);
const RECORDS: usize = 2_000;
const RECORD_BYTES: usize = 1 << 10;
const LISTS: usize = 50;

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let temporary = tempfile::tempdir()?;
    let directory = std::env::args_os().nth(1).map_or(temporary.path().to_owned(), PathBuf::from);
    let path = directory.join("store-rate");
    let store = Arc::new(open(&path).await?);
    fill(&store).await?;
    for writers in [1, 64] {
        let writes = write(&store, writers).await?;
        println!("{writers:>3} writers   {:>9.0} acknowledged writes/s", writes as f64 / SPAN.as_secs_f64());
    }
    list(&store).await?;
    let revision = store.revision().await?;
    println!("revision {revision}, {:.1} MiB", std::fs::metadata(&path)?.len() as f64 / f64::from(1 << 20));
    timed("close", store.close()).await;
    let store = timed("open and check", open(&path)).await?;
    timed("compact", store.compact(revision)).await?;
    store.close().await;
    for suffix in ["", "-wal", "-shm", ".lock"] {
        let mut name = path.clone().into_os_string();
        name.push(suffix);
        // Some of them are gone already.
        let _ = std::fs::remove_file(name);
    }
    Ok(())
}

async fn open(path: &Path) -> Result<SqliteStore, berth_store::Error> {
    SqliteStore::open(path, Arc::new(SystemClock::new())).await
}

async fn fill(store: &Arc<SqliteStore>) -> Result<(), Box<dyn std::error::Error>> {
    let writes: Vec<_> = (0..RECORDS)
        .map(|n| {
            let store = store.clone();
            tokio::spawn(
                async move { store.put(&format!("/vms/{n:05}"), vec![b'x'; RECORD_BYTES].into()).await },
            )
        })
        .collect();
    for write in writes {
        write.await??;
    }
    Ok(())
}

/// Each writer waits for its write before it makes the next.
async fn write(store: &Arc<SqliteStore>, writers: usize) -> Result<usize, Box<dyn std::error::Error>> {
    let end = Instant::now() + SPAN;
    let tasks: Vec<_> = (0..writers)
        .map(|writer| {
            let store = store.clone();
            tokio::spawn(async move {
                let mut writes = 0;
                while Instant::now() < end {
                    let key = format!("/rate/{writer}-{}", writes % 100);
                    store.put(&key, vec![b'y'; RECORD_BYTES].into()).await?;
                    writes += 1;
                }
                Ok::<usize, berth_store::Error>(writes)
            })
        })
        .collect();
    let mut total = 0;
    for task in tasks {
        total += task.await??;
    }
    Ok(total)
}

async fn list(store: &SqliteStore) -> Result<(), Box<dyn std::error::Error>> {
    let before = store.revision().await?;
    store.put("/other", "x".into()).await?;
    for (name, query) in [("now", Query::prefix("/vms/")), ("earlier", Query::prefix("/vms/").at(before))] {
        let mut times = Vec::with_capacity(LISTS);
        for _ in 0..LISTS {
            let begin = Instant::now();
            let page = store.list(query.clone()).await?;
            times.push(begin.elapsed());
            assert_eq!(page.entries.len(), RECORDS, "all records are listed");
        }
        times.sort_unstable();
        let (median, worst) = (times[LISTS / 2], times[LISTS - 1]);
        println!(
            "list of {RECORDS} records of {RECORD_BYTES} B, {name}: median {median:.1?}, worst {worst:.1?}"
        );
    }
    Ok(())
}

async fn timed<T>(what: &str, work: impl Future<Output = T>) -> T {
    let begin = Instant::now();
    let result = work.await;
    println!("{what}: {:.1?}", begin.elapsed());
    result
}
