//! Measures `audit_verify_million_seconds`: how long checking an export of a million records takes.
//!
//! The records are of the size and form of the product's own; the export is written to a file and read from there.

use std::io::{BufReader, BufWriter, Write};
use std::time::Instant;

use berth_tlog::SigningKey;
use berth_tlog::export::{self, Question};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let count: u64 = std::env::args().nth(1).map_or(Ok(1_000_000), |text| text.parse())?;
    let key = SigningKey::generate("berth-audit/bench")?;
    let records: Vec<Vec<u8>> = (0..count).map(record).collect();
    let path = std::env::temp_dir().join(format!("berth-verify-rate-{}.jsonl", std::process::id()));
    let mut file = BufWriter::new(std::fs::File::create(&path)?);
    file.write_all(&export::write("berth-audit/bench", &records, &key))?;
    file.flush()?;
    drop((file, records));
    let start = Instant::now();
    let reader = BufReader::with_capacity(1 << 20, std::fs::File::open(&path)?);
    let found = export::verify(reader, &Question { keys: vec![key.public().clone()], known: None });
    let seconds = start.elapsed().as_secs_f64();
    let bytes = std::fs::metadata(&path)?.len();
    std::fs::remove_file(&path)?;
    assert_eq!(found?.end, count);
    println!(
        "{{\"audit_verify_million_seconds\":{:.3},\"records\":{count},\"bytes\":{bytes}}}",
        seconds * 1e6 / count as f64
    );
    Ok(())
}

fn record(sequence: u64) -> Vec<u8> {
    format!(
        "{{\"sequence\":{sequence},\"request_id\":\"req-{sequence:016x}\",\"actor\":\"user-{}\",\
         \"actor_id\":\"user-0c5x9qzk3m1d7w2f\",\"method\":\"token\",\"address\":\"192.0.2.{}:40000\",\
         \"action\":\"vm.view\",\"request\":\"GET /v1/vms/accounting%2Fbooks-{sequence}\",\
         \"resources\":[\"vm:accounting/books-{sequence}\"],\"decision\":\"allow\",\
         \"reason\":\"policy 'administrators-may-everything' permits it\",\
         \"policies\":[\"administrators-may-everything\"],\"policy_hash\":\"\",\
         \"started_at\":\"2026-11-22T13:05:52.007Z\",\"finished_at\":\"2026-11-22T13:05:52.010Z\",\"status\":200,\
         \"result\":\"ok\"}}",
        sequence % 1000,
        sequence % 250,
    )
    .into_bytes()
}
