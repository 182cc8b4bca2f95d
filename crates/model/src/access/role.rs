//! The roles that every cluster has.

use super::{Action, ActionGroup};

/// A role that can be copied and not changed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BuiltInRole {
    /// What it is called.
    pub name: &'static str,
    /// What it is for, in a line.
    pub summary: &'static str,
    groups: &'static [ActionGroup],
    besides: &'static [Action],
}

impl BuiltInRole {
    /// The actions that it has.
    pub fn actions(&self) -> impl Iterator<Item = Action> + '_ {
        Action::ALL.iter().copied().filter(|action| self.has(*action))
    }

    /// Whether it has this action.
    pub fn has(&self, action: Action) -> bool {
        self.groups.contains(&action.group()) || self.besides.contains(&action)
    }
}

/// All of them.
pub const BUILT_IN_ROLES: [BuiltInRole; 7] = [
    BuiltInRole {
        name: "viewer",
        summary: "sees VMs, their snapshots and operations",
        groups: &[ActionGroup::View],
        besides: &[],
    },
    BuiltInRole {
        name: "operator",
        summary: "starts, stops, moves, snapshots and restores VMs",
        groups: &[ActionGroup::View, ActionGroup::Operate],
        besides: &[],
    },
    BuiltInRole {
        name: "configurator",
        summary: "makes, changes and deletes VMs, snapshots, schedules and images, and uses consoles",
        groups: &[ActionGroup::View, ActionGroup::Operate],
        besides: &[
            Action::VmConsole,
            Action::SnapshotDiff,
            Action::VmCreate,
            Action::VmConfigure,
            Action::VmDelete,
            Action::SnapshotClone,
            Action::SnapshotPin,
            Action::SnapshotDelete,
            Action::ScheduleManage,
            Action::ImageImport,
            Action::ImageDelete,
        ],
    },
    BuiltInRole {
        name: "security-officer",
        summary: "decides what needs a second person, and reads the audit and who may do what",
        groups: &[ActionGroup::View, ActionGroup::Secure],
        besides: &[Action::UserView, Action::GrantView, Action::PolicyView],
    },
    BuiltInRole {
        name: "auditor",
        summary: "sees everything that is recorded, and changes nothing",
        groups: &[ActionGroup::View],
        besides: &[
            Action::MetricsView,
            Action::AuditView,
            Action::UserView,
            Action::GrantView,
            Action::PolicyView,
        ],
    },
    BuiltInRole {
        name: "host-operator",
        summary: "looks after hosts: lets them join, empties them, takes them out",
        groups: &[],
        besides: &[
            Action::HostView,
            Action::HostJoin,
            Action::HostRemove,
            Action::VmView,
            Action::VmMigrate,
            Action::OperationView,
            Action::OperationCancel,
            Action::MetricsView,
        ],
    },
    BuiltInRole { name: "admin", summary: "everything", groups: &ActionGroup::GRANTABLE, besides: &[] },
];

/// The built-in role of this name.
pub fn built_in_role(name: &str) -> Option<&'static BuiltInRole> {
    BUILT_IN_ROLES.iter().find(|role| role.name == name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn admin_has_every_action_that_can_be_granted_and_no_role_has_more() {
        let admin = built_in_role("admin").expect("there");
        for action in Action::ALL {
            assert_eq!(admin.has(*action), action.is_grantable(), "{action:?}");
        }
        for role in BUILT_IN_ROLES {
            assert!(role.actions().all(|action| admin.has(action)), "{}", role.name);
        }
    }

    #[test]
    fn reading_all_of_a_vm_comes_by_the_way_with_no_role_but_consoles_and_diffs_for_who_makes_vms() {
        for role in BUILT_IN_ROLES.iter().filter(|role| role.name != "admin") {
            let data: Vec<Action> =
                role.actions().filter(|action| action.group() == ActionGroup::Data).collect();
            let is_maker = role.name == "configurator";
            let expected = if is_maker { vec![Action::VmConsole, Action::SnapshotDiff] } else { Vec::new() };
            assert_eq!(data, expected, "{}", role.name);
        }
    }

    #[test]
    fn who_audits_changes_nothing() {
        let auditor = built_in_role("auditor").expect("there");
        assert!(auditor.actions().all(|action| action.as_str().ends_with(".view")));
    }
}
