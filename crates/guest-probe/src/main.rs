//! The program that runs in test guests: `run` is the probe, `netconf` helps the guest's init, `ask` is for people.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;
use std::{env, fs, thread};

use guest_probe::client::ProbeClient;
use guest_probe::engine::{Config, Probe};
use guest_probe::protocol::Changes;
use guest_probe::{PORT_NAME, UDP_PORT, netconf, serve};

const USAGE: &str = "usage:
  guest-probe run [--data DIR …] [--listen ADDRESS:PORT] [--own-kernel] [NAME=VALUE …]
  guest-probe netconf FILE
  guest-probe ask ADDRESS:PORT VERB [ARGUMENTS]
settings: memory_mib, rate_mib_s, hot_mib, pattern";

fn main() -> ExitCode {
    let arguments: Vec<String> = env::args().skip(1).collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let done = match words.as_slice() {
        ["run", rest @ ..] => run(rest),
        ["netconf", file] => show_netconf(file),
        ["ask", address, request @ ..] if !request.is_empty() => ask(address, request),
        _ => Err(USAGE.to_owned()),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(why) => {
            eprintln!("guest-probe: {why}");
            ExitCode::FAILURE
        }
    }
}

fn run(words: &[&str]) -> Result<(), String> {
    let (config, listen) = configuration(words)?;
    let probe = Probe::start(&config).map_err(|error| format!("the probe can't start: {error}"))?;
    let bound = serve::udp(&probe, listen).map_err(|error| format!("{listen} can't be bound: {error}"))?;
    if let Err(error) = serve::port(&probe, PORT_NAME) {
        // The probe is of use without its port; whoever waits for the port's event will say that it never came.
        eprintln!("guest-probe: port {PORT_NAME} can't be opened: {error}");
    }
    println!("guest-probe ready, nonce {}, udp {bound}", probe.nonce());
    loop {
        thread::sleep(Duration::from_secs(3600));
    }
}

fn configuration(words: &[&str]) -> Result<(Config, SocketAddr), String> {
    let mut config = Config::default();
    let mut listen = SocketAddr::from(([0, 0, 0, 0], UDP_PORT));
    let mut changes = Changes::default();
    let mut words = words.iter();
    while let Some(word) = words.next() {
        match *word {
            "--data" => config.data.push(PathBuf::from(words.next().ok_or(USAGE)?)),
            "--listen" => listen = socket_address(words.next().ok_or(USAGE)?)?,
            "--own-kernel" => config.own_kernel = true,
            setting => changes.take(setting).map_err(|bad| format!("{bad}\n{USAGE}"))?,
        }
    }
    config.settings = changes.applied_to(config.settings);
    Ok((config, listen))
}

fn socket_address(text: &str) -> Result<SocketAddr, String> {
    text.parse().map_err(|_| format!("{text:?} is no ADDRESS:PORT"))
}

fn show_netconf(file: &str) -> Result<(), String> {
    let text = fs::read_to_string(file).map_err(|error| format!("{file}: {error}"))?;
    for step in netconf::parse(&text).map_err(|why| format!("{file}: {why}"))? {
        println!("{step}");
    }
    Ok(())
}

fn ask(address: &str, request: &[&str]) -> Result<(), String> {
    let client = ProbeClient::new(socket_address(address)?).map_err(|error| error.to_string())?;
    let reply = client.ask(request[0], &request[1..].join(" "), Duration::from_secs(60));
    println!("{}", reply.map_err(|error| error.to_string())?);
    Ok(())
}
