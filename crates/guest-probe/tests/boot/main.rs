//! The test guest on real QEMU with user-mode networking, driven from outside as the demo and the end-to-end
//! tests drive it. `cargo xtask guest` must have made the image.

mod machine;

use std::time::{Duration, Instant};

use guest_probe::client::ProbeError;
use guest_probe::gap::GapMeter;
use guest_probe::memory::{Rewrite, Settings};
use machine::{Machine, Seed};

const LONG: Duration = Duration::from_secs(90);

const STATIC: &str = "version: 2
ethernets:
  eth0:
    addresses:
    - 10.0.2.77/24
    gateway4: 10.0.2.2
";

#[test]
fn guest_boots_and_does_what_it_is_told_until_it_is_broken() {
    let mut machine = Machine::new(Seed::None).boot();
    let ready = machine.probe.event("ready", LONG);
    assert_eq!(ready["files"], true);
    let probe = machine.client();
    let first = probe.tick_within(LONG).expect("a tick");
    assert_eq!(ready["nonce"].as_str(), Some(first.nonce.as_str()));

    let settings = Settings { memory_mib: 48, rate_mib_s: 20, hot_mib: 16, rewrite: Rewrite::Whole };
    probe.set(settings, LONG).expect("the area is filled");
    assert_eq!(probe.write(5).expect("files are written"), 5);
    let found = probe.verify(LONG).expect("it verifies");
    assert_eq!((found.pages, found.pages_wrong, found.files, found.files_wrong), (48 * 256, 0, 5, 0));
    let dirtied = probe.status().expect("a status").dirtied_pages;
    assert!(probe.status().expect("a status").dirtied_pages >= dirtied);

    for _ in 0..2 {
        machine.probe.send("write port-1 2");
        let reply = machine.probe.reply("port-1", LONG);
        assert_eq!(reply["files"], 7, "{reply}");
    }
    machine.probe.send("\u{0}\u{1}nonsense");
    machine.probe.send("set port-2 memory_mib=100000");
    assert_eq!(machine.probe.reply("port-2", LONG)["error"], "too_much_memory");
    assert!(machine.probe.event("tick", LONG)["tick"].as_u64() > Some(first.tick));

    probe.break_data().expect("it breaks its data");
    assert_eq!(probe.verify(LONG).expect("it verifies").files_wrong, 7);
    let meter = GapMeter::start(&[probe.address()], Duration::from_millis(20)).expect("a meter");
    meter.wait_for_answer_after(Instant::now(), LONG).expect("it answers before the end");
    probe.break_panic().expect("it falls silent");
    let broken = Instant::now();
    assert_eq!(meter.wait_for_answer_after(broken, Duration::from_secs(2)), None);
    assert!(meter.longest_gap_since(broken).length >= Duration::from_secs(2));
    assert!(machine.is_running(), "a panicked guest stays as it is");
}

#[test]
fn guest_boots_from_its_seed_stops_at_the_power_button_and_keeps_its_files() {
    let machine = Machine::new(Seed::Disk(STATIC)).boot();
    machine.probe.event("ready", LONG);
    let probe = machine.client();
    probe.write(3).expect("files are written");
    let first = probe.tick().expect("a tick");
    machine.agent.send(r#"{"execute":"guest-get-host-name"}"#);
    assert_eq!(machine.agent.line(LONG)["return"]["host-name"], "seeded-1");
    machine.press_power_button();
    let machine = machine.wait_until_off(LONG).boot();

    machine.probe.event("ready", LONG);
    let probe = machine.client();
    let second = probe.tick_within(LONG).expect("a tick");
    assert_ne!(first.nonce, second.nonce, "another start has another nonce");
    let found = probe.verify(LONG).expect("it verifies");
    assert_eq!((found.files, found.files_wrong), (3, 0));
    machine.agent.send(r#"{"execute":"guest-shutdown"}"#);
    machine.wait_until_off(LONG);
}

#[test]
fn guest_boots_without_a_disk_and_leaves_a_foreign_disk_alone() {
    let machine = Machine::new(Seed::None).with_disk(b"\x55\xaa this is somebody's data").boot();
    machine.probe.event("ready", LONG);
    assert!(!machine.client().status().expect("a status").files_possible);
    assert!(machine.disk_starts_with(b"\x55\xaa this is somebody's data"));

    let machine = Machine::new(Seed::None).without_disk().boot();
    machine.probe.event("ready", LONG);
    let refused = machine.client().write(1);
    assert!(matches!(refused, Err(ProbeError::Refused { code, .. }) if code == "no_files"));
}
