//! The machine as a whole: what it is, whether it runs.

use serde::{Deserialize, Serialize};

use super::{Command, Done, command, open_enum};

command! {
    /// Asks for QEMU's version; for people and logs.
    QueryVersion = "query-version" -> Version {}
}

/// A QEMU version.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct Version {
    /// The release.
    pub qemu: VersionNumber,
    /// The distribution's name for its package, may be empty.
    #[serde(default)]
    pub package: String,
}

/// A release.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Deserialize)]
pub struct VersionNumber {
    /// As in **7**.2.22.
    pub major: u64,
    /// As in 7.**2**.22.
    pub minor: u64,
    /// As in 7.2.**22**.
    pub micro: u64,
}

command! {
    /// Asks whether the guest runs.
    QueryStatus = "query-status" -> Status {}
}

/// Whether the guest runs, and why not.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct Status {
    /// Whether its processors run.
    pub running: bool,
    /// The state in full.
    pub status: RunState,
}

open_enum! {
    /// A machine's run state.
    RunState {
        /// Runs.
        Running = "running",
        /// Stopped by a command.
        Paused = "paused",
        /// Not started yet.
        Prelaunch = "prelaunch",
        /// Waits for, or takes in, a migration.
        InMigrate = "inmigrate",
        /// Stopped for the last phase of a migration.
        FinishMigrate = "finish-migrate",
        /// Has been migrated away; must not run on without good reason.
        PostMigrate = "postmigrate",
        /// Stopped because a disk request failed.
        IoError = "io-error",
        /// Stopped by a fault of QEMU's own.
        InternalError = "internal-error",
        /// Its kernel panicked.
        GuestPanicked = "guest-panicked",
        /// Switched off.
        Shutdown = "shutdown",
        /// Asleep.
        Suspended = "suspended",
        /// Takes a snapshot.
        SaveVm = "save-vm",
        /// Loads one.
        RestoreVm = "restore-vm",
        /// Stopped by a watchdog.
        Watchdog = "watchdog",
        /// Stopped by a debugger.
        Debug = "debug",
        /// Replicated by COLO.
        Colo = "colo",
    }
}

command! {
    /// Stops the guest's processors. Disks are drained and flushed before the answer comes.
    Stop = "stop" -> Done {}
}
command! {
    /// Lets them run.
    Cont = "cont" -> Done {}
}
command! {
    /// Presses the power button; whether the guest obeys is its affair.
    SystemPowerdown = "system_powerdown" -> Done {}
}
command! {
    /// Resets the machine.
    SystemReset = "system_reset" -> Done {}
}
command! {
    /// Ends QEMU. The answer may be the last thing heard, or not be heard at all.
    Quit = "quit" -> Done {}
}
command! {
    /// Asks for the virtual processors and the threads that run them.
    QueryCpusFast = "query-cpus-fast" -> Vec<Cpu> {}
}

/// A virtual processor.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct Cpu {
    /// Its number.
    #[serde(rename = "cpu-index")]
    pub index: u64,
    /// The host's thread that runs it.
    #[serde(rename = "thread-id")]
    pub thread_id: i32,
    /// Its path in QEMU's object tree.
    #[serde(rename = "qom-path", default)]
    pub qom_path: String,
}

command! {
    /// Asks for the kinds of objects that there are.
    QomListTypes = "qom-list-types" -> Vec<ObjectType> {
        /// Only those that are of this kind, too, such as `device`.
        implements: String = "implements",
    }
}

/// A kind of objects.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct ObjectType {
    /// Its name, such as `vmgenid`.
    pub name: String,
}

command! {
    /// Asks for the machine types that can be started.
    QueryMachines = "query-machines" -> Vec<MachineType> {}
}

/// A machine type.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct MachineType {
    /// Its name, such as `pc-q35-7.2`.
    pub name: String,
    /// A short name for it, such as `q35`.
    pub alias: Option<String>,
    /// The most processors it takes.
    #[serde(rename = "cpu-max", default)]
    pub cpus_max: u64,
    /// Whether it is on its way out.
    #[serde(default)]
    pub deprecated: bool,
}

super::command! {
    /// Has the monitor for people carry a line out: for the few things that have no command of their own. The reply is
    /// what a person would read, and empty when all is well.
    HumanMonitorCommand = "human-monitor-command" -> String {
        /// The line.
        command_line: String = "command-line",
    }
}

/// Asks for the blocks of memory and where they lie in QEMU's address space. It goes through the monitor for people,
/// the only one that tells; read the reply with [`parse_ram_blocks`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct InfoRamBlock {
    #[serde(rename = "command-line")]
    line: &'static str,
}

impl Default for InfoRamBlock {
    fn default() -> Self {
        Self { line: "info ramblock" }
    }
}

impl Command for InfoRamBlock {
    const NAME: &'static str = "human-monitor-command";
    type Reply = String;
}

/// A block of memory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RamBlock {
    /// Its name in the migration stream, such as `pc.ram`.
    pub name: String,
    /// Its used length in bytes.
    pub used_bytes: u64,
    /// Where it lies in QEMU's own address space; from QEMU 8.1 on.
    pub host_address: Option<u64>,
}

/// Reads the table that [`InfoRamBlock`] returns. The columns are found by their headings, since versions differ; a
/// line that does not fit is left out.
#[must_use]
pub fn parse_ram_blocks(table: &str) -> Vec<RamBlock> {
    let mut lines = table.lines();
    // Two headings are of two words, and only ever these.
    let heading = lines.next().unwrap_or_default().replace("Block Name", "Name");
    let columns: Vec<&str> = heading.split_whitespace().collect();
    let column = |name| columns.iter().position(|&heading| heading == name);
    let (Some(psize), Some(used)) = (column("PSize"), column("Used")) else { return Vec::new() };
    let address = column("HVA");
    lines.filter_map(|line| parse_ram_block(line, psize, used, address)).collect()
}

fn parse_ram_block(line: &str, psize: usize, used: usize, address: Option<usize>) -> Option<RamBlock> {
    // The page size is printed as two words ("4 KiB"), which moves everything after it by one.
    let words: Vec<&str> = line.split_whitespace().collect();
    let number = |column: usize| {
        let at = if column > psize { column + 1 } else { column };
        u64::from_str_radix(words.get(at)?.strip_prefix("0x")?, 16).ok()
    };
    Some(RamBlock {
        name: (*words.first()?).to_owned(),
        used_bytes: number(used)?,
        host_address: address.and_then(number),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ram_blocks_are_read_with_and_without_addresses() {
        let old = "              Block Name    PSize              Offset               Used              Total\n\
                                 pc.ram    4 KiB  0x0000000000000000 0x0000000010000000 0x0000000010000000\n";
        let new = "              Block Name    PSize              Offset               Used              Total                HVA  RO\n\
                                 pc.ram    4 KiB  0x0000000000000000 0x0000000010000000 0x0000000010000000 0x00007f0000000000  rw\n\
                                 broken line\n";
        let block = |host_address| RamBlock { name: "pc.ram".into(), used_bytes: 0x1000_0000, host_address };
        assert_eq!(parse_ram_blocks(old), [block(None)]);
        assert_eq!(parse_ram_blocks(new), [block(Some(0x7f00_0000_0000))]);
        assert_eq!(parse_ram_blocks("unknown command: 'info ramblock'"), []);
    }
}
