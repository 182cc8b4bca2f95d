//! Who guesses passwords is made to wait, longer and longer; who has the right one is not kept out by others.
//!
//! Three counts, each of failures that doubles a wait once it is past what a clumsy person makes:
//!
//! - for an account from one address: after 5, from a second to a quarter of an hour. This is what stops guessing;
//! - for an account from everywhere: after 20, from a second to a minute. This is what slows down a guesser with many
//!   addresses. It does not hold for addresses from which the account has logged in well before, so that nobody can
//!   keep an administrator out from elsewhere for good;
//! - for an address, whatever the account: after 30, from a second to five minutes. This is what stops trying one
//!   password on all names, and keeps one caller from having all the processors.
//!
//! An attempt is counted before the password is looked at and uncounted when it was right, so that many at once gain
//! nothing. One that comes while it has to wait is not counted: a wait ends, whatever others do. It gets the answer
//! of a wrong password, also when the password is right. What is counted for an account is recorded, so that a
//! restart of the manager forgives nobody; what is counted for addresses is forgotten by one.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::{Mutex, PoisonError};

use berth_model::{Timestamp, UserId};
use serde::{Deserialize, Serialize};

use crate::records::{Record, Records, RecordsError, Transaction};

/// Most addresses that are remembered, for all accounts together.
const ADDRESSES_MAX: usize = 4096;
/// Most addresses whose failures are remembered for one account. The count from everywhere holds the others.
const PAIRS_MAX: usize = 32;
/// Most addresses that are remembered as good for one account.
const GOOD_MAX: usize = 8;
/// How long an address counts as good after the last good login from it, in milliseconds: a quarter of a year.
const GOOD_FOR_MS: u64 = 90 * 24 * 3_600_000;

/// When to begin to hold, and for how long.
struct Rule {
    /// Failures that nobody has to wait for.
    free: u32,
    /// The first wait; each further failure doubles it.
    first_ms: u64,
    /// The longest wait.
    most_ms: u64,
    /// After how long without a failure all are forgotten.
    forget_ms: u64,
}

const PAIR: Rule = Rule { free: 5, first_ms: 1000, most_ms: 15 * 60_000, forget_ms: 24 * 3_600_000 };
const ACCOUNT: Rule = Rule { free: 20, first_ms: 1000, most_ms: 60_000, forget_ms: 3_600_000 };
const ADDRESS: Rule = Rule { free: 30, first_ms: 1000, most_ms: 5 * 60_000, forget_ms: 3_600_000 };

/// Failures in a row, and when the last one was.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
struct Failures {
    count: u32,
    last_at_ms: u64,
}

impl Failures {
    fn is_held(self, rule: &Rule, now: Timestamp) -> bool {
        let Some(over) = self.count.checked_sub(rule.free).filter(|over| *over > 0) else { return false };
        let wait_ms = rule.first_ms.checked_shl(over - 1).map_or(rule.most_ms, |wait| wait.min(rule.most_ms));
        let wait_ms = if over > 20 { rule.most_ms } else { wait_ms };
        self.age_ms(now) < wait_ms
    }

    const fn age_ms(self, now: Timestamp) -> u64 {
        now.as_millis().saturating_sub(self.last_at_ms)
    }

    fn add(&mut self, rule: &Rule, now: Timestamp) {
        if self.age_ms(now) >= rule.forget_ms {
            self.count = 0;
        }
        *self = Self { count: self.count.saturating_add(1), last_at_ms: now.as_millis() };
    }

    const fn take_back(&mut self) {
        self.count = self.count.saturating_sub(1);
    }
}

/// What is counted for an account, as it is recorded.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LockRow {
    user: UserId,
    everywhere: Failures,
    pairs: Vec<Pair>,
    good: Vec<Good>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Pair {
    address: IpAddr,
    failures: Failures,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Good {
    address: IpAddr,
    at: Timestamp,
}

impl Record for LockRow {
    const PREFIX: &'static str = "/login-locks/";
    const NOUN: &'static str = "login lock";
    fn record_id(&self) -> String {
        self.user.to_string()
    }
}

impl LockRow {
    const fn new(user: UserId) -> Self {
        Self { user, everywhere: Failures { count: 0, last_at_ms: 0 }, pairs: Vec::new(), good: Vec::new() }
    }

    fn is_good(&self, address: IpAddr, now: Timestamp) -> bool {
        self.good.iter().any(|good| good.address == address && now.millis_since(good.at) < GOOD_FOR_MS)
    }

    fn is_held(&self, address: IpAddr, now: Timestamp) -> bool {
        let pair = self.pairs.iter().find(|pair| pair.address == address);
        pair.is_some_and(|pair| pair.failures.is_held(&PAIR, now))
            || (!self.is_good(address, now) && self.everywhere.is_held(&ACCOUNT, now))
    }

    fn count(&mut self, address: IpAddr, now: Timestamp) {
        if !self.is_good(address, now) {
            self.everywhere.add(&ACCOUNT, now);
        }
        if let Some(pair) = self.pairs.iter_mut().find(|pair| pair.address == address) {
            pair.failures.add(&PAIR, now);
            return;
        }
        self.pairs.retain(|pair| pair.failures.age_ms(now) < PAIR.forget_ms);
        if self.pairs.len() >= PAIRS_MAX {
            let weakest = (0..self.pairs.len()).min_by_key(|index| {
                let failures = self.pairs[*index].failures;
                (failures.count, failures.last_at_ms)
            });
            if let Some(weakest) = weakest {
                self.pairs.swap_remove(weakest);
            }
        }
        let mut failures = Failures::default();
        failures.add(&PAIR, now);
        self.pairs.push(Pair { address, failures });
    }

    fn succeeded(&mut self, address: IpAddr, now: Timestamp) {
        if !self.is_good(address, now) {
            self.everywhere.take_back();
        }
        self.pairs.retain(|pair| pair.address != address);
        self.good.retain(|good| good.address != address);
        self.good.insert(0, Good { address, at: now });
        self.good.truncate(GOOD_MAX);
    }
}

/// Whether an attempt may go on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Attempt {
    /// It may, and is counted as failed until [`Lockout::succeeded`] says otherwise.
    Counted,
    /// The account is held for this address: to be refused after all the work of a wrong password.
    AccountHeld,
    /// The address is held: to be refused without any work. What the time tells is about the caller alone.
    AddressHeld,
}

/// Counts failed logins.
#[derive(Default)]
pub struct Lockout {
    accounts: Mutex<HashMap<UserId, LockRow>>,
    addresses: Mutex<HashMap<IpAddr, Failures>>,
    saving: tokio::sync::Mutex<()>,
}

impl Lockout {
    /// Counts an attempt at an account (none: there is no such account) from an address, if it may go on.
    pub fn attempt(
        &self,
        records: &Records,
        account: Option<&UserId>,
        address: IpAddr,
        now: Timestamp,
    ) -> Attempt {
        let address = network_of(address);
        let mut addresses = self.addresses.lock().unwrap_or_else(PoisonError::into_inner);
        if addresses.get(&address).is_some_and(|failures| failures.is_held(&ADDRESS, now)) {
            return Attempt::AddressHeld;
        }
        if let Some(user) = account {
            let mut accounts = self.accounts.lock().unwrap_or_else(PoisonError::into_inner);
            let row = known(&mut accounts, records, user);
            if row.is_held(address, now) {
                return Attempt::AccountHeld;
            }
            row.count(address, now);
        }
        make_room(&mut addresses, address, now);
        addresses.entry(address).or_default().add(&ADDRESS, now);
        Attempt::Counted
    }

    /// The attempt that was counted has ended in a login.
    pub fn succeeded(&self, records: &Records, user: &UserId, address: IpAddr, now: Timestamp) {
        let address = network_of(address);
        let mut accounts = self.accounts.lock().unwrap_or_else(PoisonError::into_inner);
        known(&mut accounts, records, user).succeeded(address, now);
        drop(accounts);
        self.not_a_guess(address);
    }

    /// The attempt that was counted was right so far. Only its own count is taken back for the address: who has one
    /// account must not wash away what it tried on others.
    pub fn not_a_guess(&self, address: IpAddr) {
        let mut addresses = self.addresses.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(failures) = addresses.get_mut(&network_of(address)) {
            failures.take_back();
        }
    }

    /// Forgets what was counted for an account: an administrator has given it a new password.
    pub fn forgive(&self, user: &UserId) {
        let mut accounts = self.accounts.lock().unwrap_or_else(PoisonError::into_inner);
        accounts.insert(user.clone(), LockRow::new(user.clone()));
    }

    /// Records what is counted for an account.
    ///
    /// # Errors
    /// When the store fails.
    pub async fn save(&self, records: &Records, user: &UserId) -> Result<(), RecordsError> {
        // One at a time, so that what was counted first is not written last.
        let _saving = self.saving.lock().await;
        let row = self.accounts.lock().unwrap_or_else(PoisonError::into_inner).get(user).cloned();
        let Some(row) = row else { return Ok(()) };
        let mut transaction = Transaction::new();
        transaction.put(&row);
        records.commit(transaction).await.map(drop)
    }
}

fn known<'a>(
    accounts: &'a mut HashMap<UserId, LockRow>,
    records: &Records,
    user: &UserId,
) -> &'a mut LockRow {
    accounts.entry(user.clone()).or_insert_with(|| {
        let recorded = records.get::<LockRow>(user.as_str());
        recorded.map_or_else(|| LockRow::new(user.clone()), |row| row.value.clone())
    })
}

fn make_room(addresses: &mut HashMap<IpAddr, Failures>, address: IpAddr, now: Timestamp) {
    if addresses.len() < ADDRESSES_MAX || addresses.contains_key(&address) {
        return;
    }
    addresses.retain(|_, failures| failures.age_ms(now) < ADDRESS.forget_ms && failures.count > 0);
    if addresses.len() >= ADDRESSES_MAX {
        let weakest = addresses
            .iter()
            .min_by_key(|(_, failures)| (failures.count, failures.last_at_ms))
            .map(|(one, _)| *one);
        if let Some(weakest) = weakest {
            addresses.remove(&weakest);
        }
    }
}

/// What counts as one address: of IPv6 the network of 64 bits, all of which one subscriber has.
pub fn network_of(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V4(address) => address.into(),
        IpAddr::V6(address) => {
            let mut segments = address.segments();
            segments[4..].fill(0);
            IpAddr::from(segments)
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;

    const HOME: IpAddr = IpAddr::V4(std::net::Ipv4Addr::new(192, 0, 2, 1));
    const AWAY: IpAddr = IpAddr::V4(std::net::Ipv4Addr::new(192, 0, 2, 2));

    struct World {
        store: Arc<berth_store::MemoryStore>,
        records: Records,
        lockout: Lockout,
        now: Timestamp,
        user: UserId,
    }

    async fn world() -> World {
        let store = Arc::new(berth_store::MemoryStore::new(Arc::new(berth_store::SystemClock::new())));
        let records = Records::open(Arc::<berth_store::MemoryStore>::clone(&store)).await.expect("records");
        World {
            store,
            records,
            lockout: Lockout::default(),
            now: Timestamp::from_millis(1_800_000_000_000),
            user: UserId::from_entropy([1; 10]),
        }
    }

    impl World {
        fn try_from(&self, address: IpAddr) -> Attempt {
            self.lockout.attempt(&self.records, Some(&self.user), address, self.now)
        }
        fn pass(&mut self, seconds: u64) {
            self.now = self.now.plus_millis(seconds * 1000);
        }
        fn good_login(&self, address: IpAddr) {
            assert_eq!(self.try_from(address), Attempt::Counted);
            self.lockout.succeeded(&self.records, &self.user, address, self.now);
        }
        fn numbered(number: u32) -> IpAddr {
            IpAddr::from((0x0a00_0000 + number).to_be_bytes())
        }
    }

    #[tokio::test]
    async fn the_wait_doubles_and_ends_whatever_is_tried_meanwhile() {
        let mut world = world().await;
        for _ in 0..=PAIR.free {
            assert_eq!(world.try_from(HOME), Attempt::Counted);
        }
        for wait_s in [1, 2, 4, 8] {
            for _ in 0..50 {
                assert_eq!(world.try_from(HOME), Attempt::AccountHeld);
            }
            world.now = world.now.plus_millis(wait_s * 1000 - 1);
            assert_eq!(world.try_from(HOME), Attempt::AccountHeld);
            world.now = world.now.plus_millis(1);
            assert_eq!(world.try_from(HOME), Attempt::Counted, "after {wait_s} s");
        }
        for _ in 0..40 {
            world.pass(15 * 60);
            assert_eq!(world.try_from(HOME), Attempt::Counted, "never longer than a quarter of an hour");
        }
    }

    #[tokio::test]
    async fn nobody_locks_out_a_user_who_has_logged_in_from_that_address_before() {
        let mut world = world().await;
        world.good_login(HOME);
        for number in 0..200 {
            world.try_from(World::numbered(number));
        }
        assert_eq!(world.try_from(World::numbered(999)), Attempt::AccountHeld, "held from everywhere else");
        world.good_login(HOME);
        world.pass(60);
        assert_eq!(
            world.try_from(World::numbered(999)),
            Attempt::Counted,
            "and never for more than a minute"
        );
    }

    #[tokio::test]
    async fn many_at_once_gain_nothing() {
        let world = world().await;
        let counted = (0..1000).filter(|_| world.try_from(HOME) == Attempt::Counted).count();
        assert_eq!(counted, PAIR.free as usize + 1);
    }

    #[tokio::test]
    async fn one_password_on_all_names_is_stopped_by_the_address() {
        let world = world().await;
        let tried = (0..1000u32)
            .filter(|_| world.lockout.attempt(&world.records, None, AWAY, world.now) == Attempt::Counted)
            .count();
        assert_eq!(tried, ADDRESS.free as usize + 1);
        assert_eq!(world.try_from(AWAY), Attempt::AddressHeld);
        assert_eq!(world.try_from(HOME), Attempt::Counted);
    }

    #[tokio::test]
    async fn an_own_account_does_not_wash_an_address_clean() {
        let world = world().await;
        let own = UserId::from_entropy([9; 10]);
        let mut tried = 0;
        for _ in 0..1000 {
            if world.lockout.attempt(&world.records, None, AWAY, world.now) == Attempt::Counted {
                tried += 1;
            }
            if world.lockout.attempt(&world.records, Some(&own), AWAY, world.now) == Attempt::Counted {
                world.lockout.succeeded(&world.records, &own, AWAY, world.now);
            }
        }
        assert_eq!(tried, ADDRESS.free as usize + 1);
    }

    #[tokio::test]
    async fn a_restart_forgives_nobody_and_an_administrator_does() {
        let mut world = world().await;
        for _ in 0..10 {
            world.try_from(HOME);
        }
        world.lockout.save(&world.records, &world.user).await.expect("saved");
        world.records =
            Records::open(Arc::<berth_store::MemoryStore>::clone(&world.store)).await.expect("records");
        world.lockout = Lockout::default();
        assert_eq!(world.try_from(HOME), Attempt::AccountHeld);
        world.lockout.forgive(&world.user);
        assert_eq!(world.try_from(HOME), Attempt::Counted);
    }

    #[tokio::test]
    async fn a_flood_of_addresses_takes_no_more_room_than_allowed() {
        let world = world().await;
        for number in 0..6000 {
            world.try_from(World::numbered(number));
            world.lockout.attempt(&world.records, None, World::numbered(number), world.now);
        }
        assert!(world.lockout.addresses.lock().expect("no panic").len() <= ADDRESSES_MAX);
        let accounts = world.lockout.accounts.lock().expect("no panic");
        assert!(accounts[&world.user].pairs.len() <= PAIRS_MAX);
    }

    #[test]
    fn a_subscriber_of_ipv6_is_one_address() {
        let of = |text: &str| network_of(text.parse().expect("an address"));
        assert_eq!(of("2001:db8::1"), of("2001:db8::ffff:1"));
        assert_ne!(of("2001:db8::1"), of("2001:db8:0:1::1"));
        assert_eq!(of("::ffff:192.0.2.1"), of("192.0.2.1"));
    }
}
