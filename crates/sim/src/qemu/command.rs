//! Commands: what each does to the machine, and what is answered.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use serde_json::{Value, json};

use super::guest::Memory;
use super::{Machine, Refusal, RunState, Shared, ended_by_itself, ended_by_signal, incoming, outgoing};
use crate::fault::{Gate, Misdeed};
use crate::oracle::Origin;

/// Does what a line says, and answers.
pub(super) fn obey(shared: &Arc<Shared>, line: &[u8], descriptors: &mut Vec<OwnedFd>) {
    let Ok(command) = serde_json::from_slice::<Value>(line) else {
        let desc = "JSON parse error, invalid keyword";
        return shared.lock().say(&json!({"error": {"class": "GenericError", "desc": desc}}));
    };
    let name = named(&command).to_owned();
    let mut machine = shared.lock();
    if machine.hangs || machine.ended {
        return;
    }
    let planned = match name.as_str() {
        "qmp_capabilities" => None,
        _ => shared.world.faults.at_command(shared.vm(), &name),
    };
    let outcome = match planned {
        None => execute(shared, &mut machine, &name, &command["arguments"], descriptors),
        Some(Misdeed::Wait(gate)) => {
            shared.oracle().note(shared.vm(), format!("{} takes its time with {name}", shared.start.process));
            drop(machine);
            return obey_later(shared, gate, command, std::mem::take(descriptors));
        }
        Some(Misdeed::Refuse(words)) => Err(Refusal::new(words)),
        Some(Misdeed::Hang) => {
            shared.oracle().note(shared.vm(), format!("{} hangs at {name}", shared.start.process));
            machine.hangs = true;
            return;
        }
        Some(Misdeed::Die) => {
            drop(machine);
            shared.oracle().note(shared.vm(), format!("{} dies at {name}", shared.start.process));
            return shared.end(ended_by_signal(11));
        }
        Some(Misdeed::DieAfter) => {
            // Whether it was done nobody hears.
            let _ = execute(shared, &mut machine, &name, &command["arguments"], descriptors);
            shared.oracle().note(shared.vm(), format!("{} dies after {name}", shared.start.process));
            machine.monitor = None;
            if machine.guest.runs() {
                let memory = machine.guest.memory();
                shared.flush(&machine, memory);
            }
            drop(machine);
            return shared.end(ended_by_signal(11));
        }
    };
    answer(&machine, &command, outcome);
    if name == "quit" {
        drop(machine);
        shared.end(ended_by_itself(0, ""));
    }
}

/// Obeys once the gate is open, whoever may have gone meanwhile.
fn obey_later(shared: &Arc<Shared>, gate: Gate, command: Value, mut descriptors: Vec<OwnedFd>) {
    let shared = Arc::clone(shared);
    let runtime = shared.world.runtime.clone();
    runtime.spawn(async move {
        let over = shared.over.clone();
        tokio::select! {
            () = over.cancelled() => return,
            () = gate.pass() => {}
        }
        let mut machine = shared.lock();
        let outcome =
            execute(&shared, &mut machine, named(&command), &command["arguments"], &mut descriptors);
        answer(&machine, &command, outcome);
    });
}

fn named(command: &Value) -> &str {
    command["execute"].as_str().or(command["exec-oob"].as_str()).unwrap_or_default()
}

fn answer(machine: &Machine, command: &Value, outcome: Result<Value, Refusal>) {
    let mut answer = match outcome {
        Ok(value) => json!({"return": value}),
        Err(Refusal { class, desc }) => json!({"error": {"class": class, "desc": desc}}),
    };
    if !command["id"].is_null() {
        answer["id"] = command["id"].clone();
    }
    machine.say(&answer);
}

fn execute(
    shared: &Arc<Shared>,
    machine: &mut Machine,
    name: &str,
    arguments: &Value,
    descriptors: &mut Vec<OwnedFd>,
) -> Result<Value, Refusal> {
    match name {
        "qmp_capabilities" => Ok(json!({})),
        "query-status" => Ok(
            json!({"running": machine.guest.runs(), "singlestep": false, "status": machine.state.as_str()}),
        ),
        "stop" => stop(shared, machine),
        "cont" => cont(shared, machine),
        "system_powerdown" => {
            machine.event("POWERDOWN", &json!({}));
            shared.power_down();
            Ok(json!({}))
        }
        "system_reset" => reset(shared, machine),
        "quit" => {
            shared.leave(machine, false, "host-qmp-quit");
            Ok(json!({}))
        }
        "getfd" => take_descriptor(machine, arguments, descriptors),
        "closefd" => match machine.descriptors.remove(text(arguments, "fdname")) {
            Some(_) => Ok(json!({})),
            None => {
                Err(Refusal::new(format!("File descriptor named '{}' not found", text(arguments, "fdname"))))
            }
        },
        "announce-self" => Ok(json!({})),
        "human-monitor-command" => Ok(json!("")),
        _ if name.starts_with("migrate") || name.starts_with("query-migrate") => {
            migration(shared, machine, name, arguments)
        }
        _ => block(shared, machine, name, arguments),
    }
}

fn migration(
    shared: &Arc<Shared>,
    machine: &mut Machine,
    name: &str,
    arguments: &Value,
) -> Result<Value, Refusal> {
    match name {
        "migrate" => outgoing::begin(shared, machine, arguments),
        "migrate-incoming" => incoming::begin(shared, machine, arguments),
        "migrate-continue" => machine.migration.go_on(arguments),
        "migrate_cancel" => {
            machine.migration.cancel();
            Ok(json!({}))
        }
        "migrate-set-capabilities" => machine.migration.set_capabilities(arguments),
        "query-migrate-capabilities" => Ok(machine.migration.capabilities()),
        "migrate-set-parameters" => Ok(json!({})),
        "query-migrate" => Ok(machine.migration.describe(shared.memory_bytes)),
        _ => Err(unknown(name)),
    }
}

fn block(
    shared: &Arc<Shared>,
    machine: &mut Machine,
    name: &str,
    arguments: &Value,
) -> Result<Value, Refusal> {
    let disk = &mut machine.disk;
    match name {
        "blockdev-add" => disk.add(arguments),
        "blockdev-del" => disk.remove(text(arguments, "node-name")),
        "blockdev-reopen" => disk.reopen(arguments),
        "transaction" => disk.transaction(&arguments["actions"]),
        "query-block" => Ok(disk.drives()),
        "query-named-block-nodes" => Ok(disk.described_nodes()),
        "query-jobs" => Ok(disk.jobs()),
        "job-dismiss" => disk.dismiss(text(arguments, "id")),
        "block-commit" => {
            let job = disk.commit(arguments)?;
            machine.event("JOB_STATUS_CHANGE", &json!({"id": job, "status": "running"}));
            machine.event("JOB_STATUS_CHANGE", &json!({"id": job, "status": "ready"}));
            Ok(json!({}))
        }
        "job-complete" => {
            let job = text(arguments, "id");
            if let Some((layer, memory)) = disk.complete(job)? {
                shared.oracle().wrote(shared.vm(), &layer, memory);
            }
            machine.event("JOB_STATUS_CHANGE", &json!({"id": job, "status": "concluded"}));
            Ok(json!({}))
        }
        _ => Err(unknown(name)),
    }
}

fn stop(shared: &Arc<Shared>, machine: &mut Machine) -> Result<Value, Refusal> {
    match machine.state {
        RunState::Running => shared.hold(machine, RunState::Paused),
        RunState::InMigrate => machine.migration.run_when_loaded = false,
        RunState::Prelaunch
        | RunState::Paused
        | RunState::FinishMigrate
        | RunState::PostMigrate
        | RunState::Shutdown => {}
    }
    Ok(json!({}))
}

fn cont(shared: &Arc<Shared>, machine: &mut Machine) -> Result<Value, Refusal> {
    match machine.state {
        RunState::Prelaunch | RunState::Paused | RunState::PostMigrate => shared.resume(machine),
        RunState::InMigrate => machine.migration.run_when_loaded = true,
        RunState::FinishMigrate => return Err(Refusal::new("Migration is not finalized yet")),
        RunState::Shutdown => return Err(Refusal::new("Resetting the Virtual Machine is required")),
        RunState::Running => {}
    }
    Ok(json!({}))
}

fn reset(shared: &Arc<Shared>, machine: &mut Machine) -> Result<Value, Refusal> {
    let memory = Memory { token: shared.world.chance.next(), ticks: 0, ready: false };
    machine.guest.replace(memory);
    if machine.guest.runs() {
        shared.oracle().note(shared.vm(), format!("{} is reset to {memory}", shared.start.process));
        shared.boot(memory.token);
    } else {
        // It boots when it is let run.
        machine.origin = Origin::Boot;
    }
    machine.event("RESET", &json!({"guest": false, "reason": "host-qmp-system-reset"}));
    Ok(json!({}))
}

fn take_descriptor(
    machine: &mut Machine,
    arguments: &Value,
    descriptors: &mut Vec<OwnedFd>,
) -> Result<Value, Refusal> {
    let Some(descriptor) = descriptors.pop() else {
        return Err(Refusal::new("No file descriptor supplied via SCM_RIGHTS"));
    };
    descriptors.clear();
    machine.descriptors.insert(text(arguments, "fdname").to_owned(), descriptor);
    Ok(json!({}))
}

pub(super) fn text<'a>(arguments: &'a Value, key: &str) -> &'a str {
    arguments[key].as_str().unwrap_or_default()
}

fn unknown(name: &str) -> Refusal {
    Refusal { class: "CommandNotFound", desc: format!("The command {name} has not been found") }
}
