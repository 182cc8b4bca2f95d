//! What this QEMU can do, asked and not concluded from its version: distributions move features both ways.

use std::collections::{BTreeMap, BTreeSet};

use crate::commands::{
    MachineType, ObjectType, QomListTypes, QueryMachines, QueryMigrateCapabilities, QueryQmpSchema,
    SchemaEntry,
};
use crate::connection::Qmp;
use crate::error::QmpError;

/// What one QEMU can do.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Abilities {
    commands: BTreeMap<String, BTreeSet<String>>,
    events: BTreeSet<String>,
    migration_capabilities: BTreeSet<String>,
    machine_types: BTreeSet<String>,
    devices: BTreeSet<String>,
}

impl Abilities {
    /// Asks a QEMU. The answer holds for the program, so once for each is enough.
    ///
    /// # Errors
    /// Whatever the queries meet.
    pub async fn ask(qmp: &Qmp) -> Result<Self, QmpError> {
        let (schema, capabilities, machines, devices) = tokio::try_join!(
            qmp.call(QueryQmpSchema {}),
            qmp.call(QueryMigrateCapabilities {}),
            qmp.call(QueryMachines {}),
            qmp.call(QomListTypes { implements: "device".to_owned() }),
        )?;
        let mut abilities = Self::from_schema(&schema);
        abilities.migration_capabilities =
            capabilities.into_iter().map(|capability| capability.name).collect();
        for MachineType { name, alias, .. } in machines {
            abilities.machine_types.insert(name);
            abilities.machine_types.extend(alias);
        }
        abilities.devices = devices.into_iter().map(|ObjectType { name, .. }| name).collect();
        Ok(abilities)
    }

    fn from_schema(schema: &[SchemaEntry]) -> Self {
        let types: BTreeMap<_, _> = schema.iter().map(|entry| (entry.name.as_str(), entry)).collect();
        let mut abilities = Self::default();
        for entry in schema {
            match entry.meta_type.as_str() {
                "command" => {
                    let arguments = entry.arg_type.as_deref().and_then(|name| types.get(name));
                    abilities
                        .commands
                        .insert(entry.name.clone(), arguments.map(|one| names(one)).unwrap_or_default());
                }
                "event" => {
                    abilities.events.insert(entry.name.clone());
                }
                _ => {}
            }
        }
        abilities
    }

    /// Whether there is this command.
    #[must_use]
    pub fn has_command(&self, command: &str) -> bool {
        self.commands.contains_key(command)
    }

    /// Whether there is this command and it takes this argument.
    #[must_use]
    pub fn has_argument(&self, command: &str, argument: &str) -> bool {
        self.commands.get(command).is_some_and(|arguments| arguments.contains(argument))
    }

    /// Whether there is this event.
    #[must_use]
    pub fn has_event(&self, event: &str) -> bool {
        self.events.contains(event)
    }

    /// Whether there is this migration capability, such as `postcopy-ram`. That it can be switched on is another
    /// question, which the host's kernel has a say in.
    #[must_use]
    pub fn has_migration_capability(&self, capability: &str) -> bool {
        self.migration_capabilities.contains(capability)
    }

    /// Whether there is this migration parameter, such as `avail-switchover-bandwidth`.
    #[must_use]
    pub fn has_migration_parameter(&self, parameter: &str) -> bool {
        self.has_argument("migrate-set-parameters", parameter)
    }

    /// The migration capabilities there are.
    pub fn migration_capabilities(&self) -> impl Iterator<Item = &str> {
        self.migration_capabilities.iter().map(String::as_str)
    }

    /// The machine types there are, short names included.
    pub fn machine_types(&self) -> impl Iterator<Item = &str> {
        self.machine_types.iter().map(String::as_str)
    }

    /// Whether there is this device, such as `vmgenid`.
    #[must_use]
    pub fn has_device(&self, device: &str) -> bool {
        self.devices.contains(device)
    }

    /// Whether there is this machine type.
    #[must_use]
    pub fn has_machine_type(&self, machine_type: &str) -> bool {
        self.machine_types.contains(machine_type)
    }
}

fn names(object: &SchemaEntry) -> BTreeSet<String> {
    object.members.iter().map(|member| member.name.clone()).collect()
}
