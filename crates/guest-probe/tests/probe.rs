//! The probe over real sockets, on this machine: every command but the one that would panic it.

use std::net::{SocketAddr, UdpSocket};
use std::time::{Duration, Instant};

use guest_probe::client::{ProbeClient, ProbeError};
use guest_probe::engine::{Config, Probe};
use guest_probe::gap::GapMeter;
use guest_probe::memory::{Rewrite, Settings};
use guest_probe::serve;

const LOOPBACK: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(std::net::Ipv4Addr::LOCALHOST), 0);
const LONG: Duration = Duration::from_secs(20);

fn served(config: &Config) -> ProbeClient {
    let probe = Probe::start(config).expect("the probe starts");
    ProbeClient::new(serve::udp(&probe, LOOPBACK).expect("a free port")).expect("a socket")
}

fn with_files() -> (tempfile::TempDir, ProbeClient) {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let settings = Settings { memory_mib: 2, ..Settings::default() };
    let client = served(&Config { data: vec![dir.path().join("data")], settings, own_kernel: false });
    (dir, client)
}

fn code(result: Result<impl Sized, ProbeError>) -> String {
    match result {
        Err(ProbeError::Refused { code, .. }) => code,
        Err(other) => panic!("{other}"),
        Ok(_) => panic!("it was not refused"),
    }
}

#[test]
fn memory_that_is_rewritten_and_files_that_are_written_verify() {
    let (_dir, client) = with_files();
    let settings = Settings { memory_mib: 8, rate_mib_s: 200, hot_mib: 4, rewrite: Rewrite::Whole };
    assert_eq!(client.set(settings, LONG).expect("it is filled").pages, 2048);
    assert_eq!(client.write(5).expect("files are written"), 5);
    let end = Instant::now() + LONG;
    while client.status().expect("a status").dirtied_pages < 2000 {
        assert!(Instant::now() < end, "the worker does not keep its pace");
    }
    let found = client.verify(LONG).expect("it verifies");
    assert_eq!((found.pages, found.pages_wrong, found.files, found.files_wrong), (2048, 0, 5, 0));
}

#[test]
fn deleted_data_is_noticed() {
    let (_dir, client) = with_files();
    client.write(4).expect("files are written");
    client.break_data().expect("it breaks");
    assert_eq!(client.verify(LONG).expect("it verifies").files_wrong, 4);
    assert_eq!(code(client.write(1)), "disk");
}

#[test]
fn a_probe_that_does_not_own_its_kernel_refuses_to_panic_it() {
    let (_dir, client) = with_files();
    assert_eq!(code(client.break_panic()), "refused");
}

#[test]
fn a_guest_without_a_disk_says_so() {
    let client = served(&Config::default());
    assert!(!client.status().expect("a status").files_possible);
    assert_eq!(code(client.write(1)), "no_files");
}

#[test]
fn a_request_sent_many_times_is_carried_out_once_and_answered_each_time() {
    let (_dir, client) = with_files();
    let socket = UdpSocket::bind(LOOPBACK).expect("a socket");
    socket.set_read_timeout(Some(LONG)).expect("a time-out");
    let mut replies = Vec::new();
    for _ in 0..5 {
        socket.send_to(b"write same-1 3", client.address()).expect("it is sent");
        let mut buffer = [0; 2048];
        let length = socket.recv(&mut buffer).expect("a reply");
        replies.push(buffer[..length].to_vec());
    }
    assert!(replies.iter().all(|reply| *reply == replies[0]));
    assert_eq!(client.status().expect("a status").files, 3);
    socket.send_to(b"write same-1 4", client.address()).expect("it is sent");
    let mut buffer = [0; 2048];
    let length = socket.recv(&mut buffer).expect("a reply");
    assert!(String::from_utf8_lossy(&buffer[..length]).contains("id_reused"));
}

#[test]
fn nonsense_is_answered_with_an_error_and_harms_nothing() {
    let (_dir, client) = with_files();
    let socket = UdpSocket::bind(LOOPBACK).expect("a socket");
    for nonsense in [&b""[..], b"\xff\xff", b"write", &[b'a'; 2000], b"set x memory_mib=99999999"] {
        socket.send_to(nonsense, client.address()).expect("it is sent");
    }
    client.tick().expect("it still ticks");
    assert_eq!(code(client.ask("set", "memory_mib=4000000000", LONG)), "too_much_memory");
    assert_eq!(code(client.ask("explode", "", LONG)), "bad_request");
    assert_eq!(client.verify(LONG).expect("it verifies").pages_wrong, 0);
}

#[test]
fn the_gap_meter_hears_the_guest_and_sees_it_fall_silent() {
    let (_dir, client) = with_files();
    let meter = GapMeter::start(&[client.address()], Duration::from_millis(5)).expect("it starts");
    let begun = Instant::now();
    let first = meter.wait_for_answer_after(begun, LONG).expect("an answer");
    assert_eq!(first.nonce, client.tick().expect("a tick").nonce);
    let nobody = UdpSocket::bind(LOOPBACK).expect("a socket");
    meter.retarget(&[nobody.local_addr().expect("an address")]);
    let silent_from = Instant::now();
    std::thread::sleep(Duration::from_millis(120));
    assert!(meter.longest_gap_since(silent_from).length >= Duration::from_millis(100));
    meter.retarget(&[client.address()]);
    let again = meter.wait_for_answer_after(Instant::now(), LONG).expect("an answer");
    assert!(again.tick > first.tick);
}

#[test]
fn silence_is_an_error_that_says_what_was_asked_and_for_how_long() {
    let nobody = UdpSocket::bind(LOOPBACK).expect("a socket");
    let client = ProbeClient::new(nobody.local_addr().expect("an address")).expect("a socket");
    let error = client.tick_within(Duration::from_millis(300)).expect_err("nobody answers");
    assert!(error.to_string().contains("tick") && error.to_string().contains("300 ms"), "{error}");
}
