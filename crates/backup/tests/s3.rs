//! A repository in a bucket, of a service that is as small as it can be: what is asked of it is what S3 takes, and what it
//! refuses is told.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::{Arc, Mutex};
use std::thread;

use berth_backup::export::SourceFile;
use berth_backup::{Label, Repository};
use berth_model::repository::{RepositoryAccess, RepositoryKeys, Secret};

/// How many names one answer lists: few, so that there are several.
const PAGE: usize = 3;

type Objects = Arc<Mutex<BTreeMap<String, Vec<u8>>>>;

/// A service that keeps objects, for requests that are signed by this key.
fn serve(objects: &Objects) -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let port = listener.local_addr().expect("an address").port();
    let objects = Arc::clone(objects);
    thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            let objects = Arc::clone(&objects);
            thread::spawn(move || while answer(&stream, &objects) {});
        }
    });
    port
}

/// Answers one request; whether there may be another.
fn answer(stream: &TcpStream, objects: &Objects) -> bool {
    let mut reader = BufReader::new(stream);
    let mut head = Vec::new();
    loop {
        let mut line = String::new();
        if reader.read_line(&mut line).unwrap_or(0) == 0 {
            return false;
        }
        if line.trim().is_empty() {
            break;
        }
        head.push(line.trim().to_owned());
    }
    let header = |name: &str| {
        head.iter().find_map(|line| {
            let (key, value) = line.split_once(':')?;
            key.eq_ignore_ascii_case(name).then(|| value.trim().to_owned())
        })
    };
    let length = header("content-length").and_then(|text| text.parse().ok()).unwrap_or(0);
    let mut body = vec![0; length];
    reader.read_exact(&mut body).expect("the body");
    let mut words = head[0].split(' ');
    let (method, target) = (words.next().expect("a method"), words.next().expect("a target"));
    let (path, query) = target.split_once('?').expect("a signed request has a query");
    let (status, content) = if query.contains("X-Amz-Signature=") && query.contains("X-Amz-Credential=AK%2F")
    {
        act(method, path.strip_prefix("/bucket").expect("the bucket"), query, header("range"), body, objects)
    } else {
        ("403 Forbidden", b"<Error><Code>AccessDenied</Code><Message>who are you</Message></Error>".to_vec())
    };
    let head = format!("HTTP/1.1 {status}\r\nContent-Length: {}\r\n\r\n", content.len());
    let mut stream = stream;
    stream.write_all(head.as_bytes()).and_then(|()| stream.write_all(&content)).is_ok()
}

fn act(
    method: &str,
    path: &str,
    query: &str,
    range: Option<String>,
    body: Vec<u8>,
    objects: &Objects,
) -> (&'static str, Vec<u8>) {
    let mut objects = objects.lock().expect("not poisoned");
    let key = path.trim_start_matches('/').to_owned();
    let missing = ("404 Not Found", b"<Error><Code>NoSuchKey</Code></Error>".to_vec());
    match method {
        "PUT" => {
            objects.insert(key, body);
            ("200 OK", Vec::new())
        }
        "DELETE" => {
            objects.remove(&key);
            ("204 No Content", Vec::new())
        }
        _ if key.is_empty() => ("200 OK", list(query, &objects)),
        _ => match (objects.get(&key), range) {
            (None, _) => missing,
            (Some(content), None) => ("200 OK", content.clone()),
            (Some(content), Some(range)) => {
                let (from, to) =
                    range.strip_prefix("bytes=").and_then(|text| text.split_once('-')).expect("a range");
                let (from, to): (usize, usize) = (from.parse().expect("from"), to.parse().expect("to"));
                ("206 Partial Content", content[from..=to].to_vec())
            }
        },
    }
}

fn list(query: &str, objects: &BTreeMap<String, Vec<u8>>) -> Vec<u8> {
    let value = |name: &str| {
        let found = query.split('&').find_map(|pair| pair.strip_prefix(&format!("{name}=")));
        found.map(|text| text.replace("%2F", "/")).unwrap_or_default()
    };
    let (prefix, after) = (value("prefix"), value("continuation-token"));
    let all: Vec<_> = objects.iter().filter(|(key, _)| key.starts_with(&prefix) && **key > after).collect();
    let items: String = all.iter().take(PAGE).map(|(key, content)| {
        format!(
            "<Contents><Key>{key}</Key><LastModified>2026-01-01T00:00:00.000Z</LastModified><ETag>\"x\"</ETag>\
             <Size>{}</Size><StorageClass>STANDARD</StorageClass></Contents>",
            content.len()
        )
    }).collect();
    let next = all.get(PAGE - 1).filter(|_| all.len() > PAGE);
    let next = next
        .map(|(key, _)| format!("<NextContinuationToken>{key}</NextContinuationToken>"))
        .unwrap_or_default();
    format!(
        "<?xml version=\"1.0\" encoding=\"UTF-8\"?><ListBucketResult xmlns=\"http://s3.amazonaws.com/doc/2006-03-01/\">\
         <Name>bucket</Name><Prefix>{prefix}</Prefix><KeyCount>{}</KeyCount><MaxKeys>{PAGE}</MaxKeys>\
         <IsTruncated>{}</IsTruncated>{items}{next}</ListBucketResult>",
        all.len().min(PAGE),
        !next.is_empty()
    )
    .into_bytes()
}

fn access(port: u16, key_id: &str) -> RepositoryAccess {
    let url = format!("s3://bucket/deep/er?endpoint=http://127.0.0.1:{port}");
    let key = format!("access_key_id={key_id}\nsecret_access_key=hunter2hunter2");
    let keys = RepositoryKeys {
        password: Secret::new("correct horse".to_owned()),
        key: Some(Secret::new(key)),
        known_hosts: None,
        ca: None,
    };
    RepositoryAccess { url: url.parse().expect("a place"), keys }
}

#[test]
fn a_bucket_holds_a_repository_below_its_prefix_and_a_stranger_is_told_so() {
    let objects = Objects::default();
    let port = serve(&objects);
    let repository = Repository::init(&access(port, "AK"), &Arc::default()).expect("a repository");
    let folder = tempfile::tempdir().expect("a directory");
    let path = folder.path().join("file");
    let content: Vec<u8> = (0..3_000_000u32).flat_map(u32::to_le_bytes).collect();
    std::fs::write(&path, &content).expect("written");
    for operation in ["op-1", "op-2", "op-3", "op-4"] {
        let label = Label {
            vm: "default/books".to_owned(),
            vm_id: format!("vm-{operation}"),
            snapshot: "first".to_owned(),
            operation: operation.to_owned(),
        };
        let files = [SourceFile { name: "layers/a.qcow2".to_owned(), path: path.clone() }];
        repository.export(&label, &files).expect("exported");
    }
    let again = Repository::open(&access(port, "AK"), &Arc::default()).expect("the repository");
    let listed = again.list().expect("listed");
    assert_eq!(listed.len(), 4, "more than one page of names");
    let target = folder.path().join("out");
    std::fs::create_dir(&target).expect("made");
    again.import(&listed[0].id, &target, u64::MAX).expect("imported");
    assert!(std::fs::read(target.join("layers/a.qcow2")).expect("there") == content);
    again.check(true).expect("whole");
    let keys: Vec<String> = objects.lock().expect("not poisoned").keys().cloned().collect();
    assert!(keys.iter().all(|key| key.starts_with("deep/er/")), "{keys:?}");
    assert!(!keys.iter().any(|key| key.contains("/locks/")), "the locks are gone: {keys:?}");

    let stranger = Repository::open(&access(port, "XX"), &Arc::default()).err().expect("refused").to_string();
    assert!(stranger.contains("AccessDenied: who are you") && !stranger.contains("hunter2"), "{stranger}");
}
