//! LDAP directories: search for the user, then bind as the user.
//!
//! The connection is TLS from its start or from StartTLS on, before anything is said. The name is escaped before it
//! stands in a filter, and exactly one entry must be found. An empty password is refused here, because LDAP takes a
//! bind with a name and no password for one of nobody, and calls it a success (RFC 4513, section 5.1.2). Who somebody
//! is, an attribute says that outlives renaming (`entryUUID`); groups are found by walking up who lists whom, so deep
//! and so many as was set. No group means anything by its name: what a group gives, an administrator wrote on a team.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use berth_model::Timestamp;
use ldap3::{
    Ldap, LdapConnAsync, LdapConnSettings, LdapError, Scope, SearchEntry, SearchOptions, ldap_escape,
};

use super::external::{External, SUBJECT_BYTES_MAX, tidy_groups};
use super::settings::LdapSettings;
use crate::digest::hex;

/// How long one question may take.
const WITHIN: Duration = Duration::from_secs(10);
/// How long a whole login may take: a walk through groups is many questions.
const LOGIN_WITHIN: Duration = Duration::from_secs(30);
/// The result code for a wrong password (RFC 4511, section 4.1.9: invalidCredentials).
const INVALID_CREDENTIALS: u32 = 49;
/// Attributes that say that an account is shut: of Active Directory, of 389 Directory Server and FreeIPA, of
/// eDirectory, of the password policy of OpenLDAP, of shadow(5).
const SHUT_ATTRIBUTES: [&str; 6] = [
    "userAccountControl",
    "accountExpires",
    "nsAccountLock",
    "loginDisabled",
    "pwdAccountLockedTime",
    "shadowExpire",
];

/// Why a directory did not say who somebody is.
#[derive(Debug, thiserror::Error)]
pub enum DirectoryError {
    /// It can't be asked.
    #[error("the directory {name} can't be asked")]
    Unreachable {
        /// Which.
        name: String,
        /// Why not.
        #[source]
        source: Box<LdapError>,
    },
    /// It took too long.
    #[error("the directory {name} did not answer in time")]
    Late {
        /// Which.
        name: String,
    },
    /// Who searches may not.
    #[error("the directory {name} refused the manager's own account")]
    OwnAccount {
        /// Which.
        name: String,
    },
    /// The name or the password is wrong, or the account is shut.
    #[error("the name or the password is wrong")]
    Wrong,
    /// More groups, or deeper ones, than was set: which ones count can't be said.
    #[error("the user is in more or deeper groups of directory {name} than it allows")]
    TooManyGroups {
        /// Which.
        name: String,
    },
}

/// A directory.
pub struct Directory {
    /// What was configured.
    pub settings: LdapSettings,
    tls: Arc<rustls::ClientConfig>,
}

impl Directory {
    /// One that nobody has connected to yet.
    pub fn new(settings: LdapSettings) -> Self {
        let tls = settings.roots.client();
        Self { settings, tls }
    }

    /// What makes its subjects unique.
    pub fn issuer(&self) -> String {
        format!("ldap:{}", self.settings.name)
    }

    /// Who has this name and password.
    ///
    /// # Errors
    /// [`DirectoryError::Wrong`] for whatever is wrong with name, password or account; else that it can't be asked.
    pub async fn login(
        &self,
        name: &str,
        password: &str,
        now: Timestamp,
    ) -> Result<External, DirectoryError> {
        if password.is_empty() || name.is_empty() {
            return Err(DirectoryError::Wrong);
        }
        let late = || DirectoryError::Late { name: self.settings.name.to_string() };
        tokio::time::timeout(LOGIN_WITHIN, self.ask(name, password, now)).await.map_err(|_| late())?
    }

    async fn ask(&self, name: &str, password: &str, now: Timestamp) -> Result<External, DirectoryError> {
        let mut ldap = self.connect().await?;
        self.bind_own(&mut ldap).await?;
        let found = self.find_user(&mut ldap, name).await?;
        // A name that nobody has costs a bind as well, so that the time does not tell.
        let nobody = format!("cn=nobody,{}", self.settings.user_base);
        let dn = found.as_ref().map_or(nobody.as_str(), |entry| entry.dn.as_str());
        let mut as_user = self.connect().await?;
        let bound = as_user.with_timeout(WITHIN).simple_bind(dn, password).await;
        let is_right = bound.map_err(|error| self.unreachable(error))?.rc == 0;
        let _ = as_user.unbind().await;
        let Some(entry) = found.filter(|_| is_right) else { return Err(DirectoryError::Wrong) };
        if is_shut(&entry, now) {
            tracing::info!(directory = %self.settings.name, "a login was refused: the account is shut");
            return Err(DirectoryError::Wrong);
        }
        let groups = self.groups(&mut ldap, &entry.dn).await?;
        let _ = ldap.unbind().await;
        let subject = self.subject(&entry).ok_or_else(|| {
            tracing::warn!(directory = %self.settings.name, attribute = self.settings.id_attribute,
                "an entry has no identity: the attribute is missing");
            DirectoryError::Wrong
        })?;
        Ok(External {
            source: self.settings.name.clone(),
            issuer: self.issuer(),
            subject,
            name: value(&entry, &self.settings.name_attribute).map(str::to_owned),
            groups: tidy_groups(groups).ok_or_else(|| self.too_many_groups())?,
        })
    }

    async fn connect(&self) -> Result<Ldap, DirectoryError> {
        let settings = LdapConnSettings::new()
            .set_conn_timeout(WITHIN)
            .set_starttls(self.settings.start_tls)
            .set_config(Arc::clone(&self.tls));
        let connected = LdapConnAsync::with_settings(settings, &self.settings.url).await;
        let (connection, ldap) = connected.map_err(|error| self.unreachable(error))?;
        tokio::spawn(async move {
            if let Err(error) = connection.drive().await {
                tracing::debug!(%error, "a connection to a directory ended");
            }
        });
        Ok(ldap)
    }

    async fn bind_own(&self, ldap: &mut Ldap) -> Result<(), DirectoryError> {
        let (dn, password) = (&self.settings.bind_dn, self.settings.bind_password.reveal());
        let bound = ldap.with_timeout(WITHIN).simple_bind(dn, password).await;
        match bound.map_err(|error| self.unreachable(error))?.rc {
            0 => Ok(()),
            code => {
                let is_wrong = code == INVALID_CREDENTIALS;
                tracing::error!(directory = %self.settings.name, code, is_wrong, "the manager's own bind was refused");
                Err(DirectoryError::OwnAccount { name: self.settings.name.to_string() })
            }
        }
    }

    /// The one entry of this name; none also when there are two: which of them is meant must not depend on order.
    async fn find_user(&self, ldap: &mut Ldap, name: &str) -> Result<Option<SearchEntry>, DirectoryError> {
        let filter = self.settings.user_filter.replace("{name}", &ldap_escape(name));
        let settings = &self.settings;
        let mut attributes = vec![settings.id_attribute.as_str(), settings.name_attribute.as_str()];
        attributes.extend(SHUT_ATTRIBUTES);
        let found = self.search(ldap, &settings.user_base, &filter, attributes, 2).await?;
        Ok(match found.as_slice() {
            [entry] => Some(entry.clone()),
            _ => None,
        })
    }

    /// Walks up: the groups that list the user, those that list them, and so on.
    async fn groups(&self, ldap: &mut Ldap, user: &str) -> Result<Vec<String>, DirectoryError> {
        let Some(base) = &self.settings.group_base else { return Ok(Vec::new()) };
        let limit = usize::try_from(self.settings.groups_max).unwrap_or(usize::MAX);
        let mut all = BTreeSet::new();
        let mut next = vec![user.to_owned()];
        for _ in 0..self.settings.group_depth_max {
            let mut above = Vec::new();
            for member in next {
                let filter = format!("({}={})", self.settings.member_attribute, ldap_escape(member.as_str()));
                for group in self.search(ldap, base, &filter, vec!["1.1"], self.settings.groups_max).await? {
                    // A circle ends here: what was seen is not walked again.
                    if all.insert(group.dn.to_lowercase()) {
                        above.push(group.dn);
                    }
                }
                if all.len() > limit {
                    return Err(self.too_many_groups());
                }
            }
            if above.is_empty() {
                return Ok(all.into_iter().collect());
            }
            next = above;
        }
        Err(self.too_many_groups())
    }

    async fn search(
        &self,
        ldap: &mut Ldap,
        base: &str,
        filter: &str,
        attributes: Vec<&str>,
        most: u32,
    ) -> Result<Vec<SearchEntry>, DirectoryError> {
        let size_limit = i32::try_from(most.saturating_add(1)).unwrap_or(i32::MAX);
        let options = SearchOptions::new().sizelimit(size_limit);
        let ldap = ldap.with_search_options(options).with_timeout(WITHIN);
        let result = ldap.search(base, Scope::Subtree, filter, attributes).await;
        let ldap3::SearchResult(entries, result) = result.map_err(|error| self.unreachable(error))?;
        match result.rc {
            // 32 is noSuchObject: nothing is below a base that is not there; 4 is sizeLimitExceeded.
            0 | 32 => {}
            4 => return Err(self.too_many_groups()),
            _ => return Err(self.unreachable(LdapError::from(result))),
        }
        Ok(entries.into_iter().filter(|entry| !entry.is_ref()).map(SearchEntry::construct).collect())
    }

    fn subject(&self, entry: &SearchEntry) -> Option<String> {
        let attribute = &self.settings.id_attribute;
        if let Some(text) = value(entry, attribute) {
            return (!text.is_empty() && text.len() <= SUBJECT_BYTES_MAX).then(|| text.to_lowercase());
        }
        let (_, binary) = entry.bin_attrs.iter().find(|(name, _)| name.eq_ignore_ascii_case(attribute))?;
        let bytes = binary.first().filter(|bytes| !bytes.is_empty() && bytes.len() <= 64)?;
        Some(hex(bytes))
    }

    fn unreachable(&self, error: LdapError) -> DirectoryError {
        DirectoryError::Unreachable { name: self.settings.name.to_string(), source: Box::new(error) }
    }

    fn too_many_groups(&self) -> DirectoryError {
        DirectoryError::TooManyGroups { name: self.settings.name.to_string() }
    }
}

fn value<'a>(entry: &'a SearchEntry, attribute: &str) -> Option<&'a str> {
    let (_, values) = entry.attrs.iter().find(|(name, _)| name.eq_ignore_ascii_case(attribute))?;
    values.first().map(String::as_str)
}

/// Whether an account is disabled, locked by an administrator, or has expired.
fn is_shut(entry: &SearchEntry, now: Timestamp) -> bool {
    let is_true = |attribute| value(entry, attribute).is_some_and(|text| text.eq_ignore_ascii_case("TRUE"));
    let number = |attribute| value(entry, attribute).map(|text| text.parse::<i64>());
    let day = i64::try_from(now.as_millis() / 86_400_000).unwrap_or(i64::MAX);
    // Since 1601, in units of 100 ns (Active Directory).
    let file_time = i64::try_from(now.as_millis())
        .unwrap_or(0)
        .saturating_mul(10_000)
        .saturating_add(116_444_736_000_000_000);
    // What is there and can't be read shuts: better one who has to ask than one who should be out.
    let disabled =
        number("userAccountControl").is_some_and(|flags| flags.map_or(true, |flags| flags & 2 != 0));
    let expired =
        number("accountExpires").is_some_and(|end| end.map_or(true, |end| end != 0 && end <= file_time));
    let shadow = number("shadowExpire").is_some_and(|end| end.map_or(true, |end| end >= 0 && end <= day));
    // Only the lock that an administrator sets has this value; others end, and the directory itself refuses the bind.
    let locked = value(entry, "pwdAccountLockedTime").is_some_and(|since| since == "000001010000Z");
    disabled || expired || shadow || locked || is_true("nsAccountLock") || is_true("loginDisabled")
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use super::*;

    fn entry(attribute: &str, value: &str) -> SearchEntry {
        let attrs = HashMap::from([(attribute.to_owned(), vec![value.to_owned()])]);
        SearchEntry { dn: "uid=a".to_owned(), attrs, bin_attrs: HashMap::new() }
    }

    #[test]
    fn shut_accounts_of_every_kind_of_directory_are_known() {
        let now = Timestamp::from_millis(1_800_000_000_000);
        for (attribute, value, shut) in [
            ("userAccountControl", "512", false),
            ("userAccountControl", "514", true),
            ("useraccountcontrol", "x", true),
            ("accountExpires", "0", false),
            ("accountExpires", "9223372036854775807", false),
            ("accountExpires", "133000000000000000", true),
            ("nsAccountLock", "true", true),
            ("nsAccountLock", "FALSE", false),
            ("loginDisabled", "TRUE", true),
            ("pwdAccountLockedTime", "000001010000Z", true),
            ("shadowExpire", "-1", false),
            ("shadowExpire", "0", true),
            ("shadowExpire", "20833", true),
            ("shadowExpire", "20834", false),
        ] {
            assert_eq!(is_shut(&entry(attribute, value), now), shut, "{attribute} {value}");
        }
    }
}
