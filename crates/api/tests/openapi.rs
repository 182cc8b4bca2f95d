//! The committed documents are those of the code.
//!
//! `BERTH_BLESS=1` writes them anew; the difference is then for a person to read, because others have written programs
//! against the old ones.

use std::path::PathBuf;

#[test]
fn the_committed_documents_are_those_of_the_code() {
    let directory = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../openapi");
    for (name, document) in
        [("manager-v1.json", berth_api::openapi::manager()), ("agent-v1.json", berth_api::openapi::agent())]
    {
        // Compared by content: how fields are ordered depends on which features others ask of `serde_json`.
        let document = serde_json::to_value(&document).expect("documents are plain data");
        let path = directory.join(name);
        if std::env::var_os("BERTH_BLESS").is_some() {
            std::fs::write(&path, format!("{document:#}\n")).expect("written");
        }
        let committed = std::fs::read_to_string(&path).unwrap_or_default();
        let committed: serde_json::Value = serde_json::from_str(&committed).unwrap_or_default();
        assert!(
            document == committed,
            "openapi/{name} is not what the code says: read why, then run with BERTH_BLESS=1"
        );
    }
}
