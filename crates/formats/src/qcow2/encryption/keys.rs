//! Changing the passwords of a LUKS image: adding them to key slots, and erasing them.
//!
//! After a power cut at any moment, at least one key slot still unlocks the disk, unless the user forces the erasure of all
//! active slots. A slot becomes active on disk only after its key material is flushed. While the only active slot is
//! overwritten with a new password, a spare slot contains the key.
//!
//! Erasing a slot overwrites and flushes its key material before the slot becomes inactive. So the password of an erased slot
//! cannot unlock the disk.

use oxblk_core::{Edge, Errno, Error, Options, Result, Secrets, WriteFlags};
use oxblk_crypto::luks::{self, SLOTS, Slot};
use oxblk_crypto::random;
use oxblk_crypto::secret::Secret;
use oxblk_ring::IoBuf;

use super::super::create_options::rejected;
use super::super::image_state::header::read_header;
use super::super::layout::{CryptMethod, CryptoHeader};
use super::create::{ITER_TIME, take_iter_time};
use super::key_needed;
use super::open::{read_luks_header, unlock, unlock_slot, wrong_password};

/// Length in bytes of the state field at the start of a slot.
const STATE: usize = 4;

/// A change of key slots, as QAPI's `QCryptoBlockAmendOptionsLUKS` describes it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Change {
    /// Adds a password.
    Add {
        /// ID of the secret object that contains the new password.
        new_secret: String,
        /// ID of the secret object with a current password. The default is the secret with which the image was opened.
        old_secret: Option<String>,
        /// The key slot to use. The default is the first free slot.
        slot: Option<usize>,
        /// The time in milliseconds that unlocking the slot should take.
        iter_time: u64,
    },
    /// Erases the slot `slot`, or all slots that the password unlocks. With both, erases the slot only if the password unlocks
    /// the slot.
    Erase {
        /// The slot to erase.
        slot: Option<usize>,
        /// ID of the secret object that contains the password.
        old_secret: Option<String>,
    },
}

impl Change {
    /// Takes the options with the prefix `encrypt.`, which the caller has removed.
    ///
    /// # Errors
    /// When an option is wrong or missing. The messages are the same as in QEMU's tools.
    pub fn take(encrypt: &mut Options) -> Result<Self> {
        let state = encrypt.take_str("state")?;
        let (new_secret, old_secret) =
            (encrypt.take_str("new-secret")?, encrypt.take_str("old-secret")?);
        let slot = encrypt.take_signed("keyslot", "encrypt.keyslot")?;
        let slot = slot.map(check_slot).transpose()?;
        let iter_time = take_iter_time(encrypt)?;
        if let Some(key) = encrypt.keys().next() {
            return Err(Error::invalid(format!("Parameter 'encrypt.{key}' is unexpected")));
        }
        match state.as_deref() {
            None => Err(Error::invalid("Parameter 'state' is missing")),
            Some("active") => Ok(Self::Add {
                new_secret: new_secret.ok_or_else(|| {
                    Error::invalid("'new-secret' is required to activate a keyslot")
                })?,
                old_secret,
                slot,
                iter_time: iter_time.unwrap_or(ITER_TIME),
            }),
            Some("inactive") if new_secret.is_some() => {
                Err(Error::invalid("'new-secret' must not be given when erasing keyslots"))
            }
            Some("inactive") if iter_time.is_some() => {
                Err(Error::invalid("'iter-time' must not be given when erasing keyslots"))
            }
            Some("inactive") => Ok(Self::Erase { slot, old_secret }),
            Some(other) => Err(rejected("state", other)),
        }
    }
}

fn check_slot(slot: i64) -> Result<usize> {
    let last = SLOTS.saturating_sub(1);
    usize::try_from(slot).ok().filter(|slot| *slot <= last).ok_or_else(|| {
        Error::invalid(format!("Invalid keyslot {slot} specified, must be between 0 and {last}"))
    })
}

/// Changes the passwords of the image in `file`, and returns the new LUKS header. `opened_with` is the ID of the secret
/// object with which the image was opened. `force` allows changes that may make the disk permanently unreadable: overwriting an
/// active slot, and erasing all active slots. `force` also allows erasing an inactive slot.
///
/// # Errors
/// When the image is not encrypted with LUKS, a secret is missing, a password unlocks no slot, or the change is refused. The
/// messages are the same as in QEMU's tools. Other errors: those of requests to the image file, and those of the LUKS code.
pub async fn change(
    file: &Edge,
    opened_with: Option<&str>,
    change: Change,
    force: bool,
    secrets: &Secrets,
) -> Result<luks::Header> {
    let image = read_header(file).await?;
    let place = match (image.crypt_method, image.extensions.crypto) {
        (CryptMethod::Luks, Some(place)) => place,
        (CryptMethod::None, _) => {
            let text = "Can't amend encryption options - encryption not present";
            return Err(Error::invalid(text));
        }
        _ => return Err(Error::unsupported("Only LUKS encryption options can be amended")),
    };
    let header = read_luks_header(file, place).await?;
    let mut slots = Slots { file, place, header };
    match change {
        Change::Add { new_secret, old_secret, slot, iter_time } => {
            let new = secrets.password(&new_secret)?;
            let old = old_secret.as_deref().or(opened_with).ok_or_else(key_needed)?;
            let old = secrets.password(old)?;
            slots.add(&old, &new, slot, iter_time, force).await?;
        }
        Change::Erase { slot, old_secret } => {
            let old = old_secret.map(|id| secrets.password(&id)).transpose()?;
            slots.erase(slot, old.as_ref(), force).await?;
        }
    }
    Ok(slots.header)
}

/// The LUKS header whose key slots are being changed.
struct Slots<'a> {
    file: &'a Edge,
    place: CryptoHeader,
    header: luks::Header,
}

impl Slots<'_> {
    fn active(&self) -> Vec<usize> {
        self.header.active_slots().map(|(index, _)| index).collect()
    }

    /// The first free slot other than `but`.
    fn free(&self, but: Option<usize>) -> Option<usize> {
        let mut slots = self.header.slots.iter().enumerate();
        slots.find(|(index, slot)| !slot.active && Some(*index) != but).map(|(index, _)| index)
    }

    async fn add(
        &mut self,
        old: &Secret,
        new: &Secret,
        slot: Option<usize>,
        iter_time: u64,
        force: bool,
    ) -> Result<()> {
        let active = self.active();
        let index = match slot {
            Some(index) if active.contains(&index) && !force => {
                return Err(Error::invalid(format!(
                    "Refusing to overwrite active keyslot {index} - please erase it first"
                )));
            }
            Some(index) => index,
            None => self
                .free(None)
                .ok_or_else(|| Error::invalid("Can't add a keyslot - all keyslots are in use"))?,
        };
        let unlocked = unlock(self.file, self.place, &self.header, old).await?;
        let (_, key) = unlocked.ok_or_else(wrong_password)?;
        // While the only active slot is overwritten, a spare slot contains the key.
        let spare = if active == [index] { self.free(Some(index)) } else { None };
        if let Some(spare) = spare {
            self.fill(spare, new, &key, iter_time).await?;
        }
        self.fill(index, new, &key, iter_time).await?;
        match spare {
            Some(spare) => self.wipe(spare).await,
            None => Ok(()),
        }
    }

    async fn erase(
        &mut self,
        slot: Option<usize>,
        old: Option<&Secret>,
        force: bool,
    ) -> Result<()> {
        let active = self.active();
        let doomed = match (slot, old) {
            (None, None) => {
                return Err(Error::invalid(
                    "To erase keyslot(s), either explicit keyslot index or the password currently \
                     contained in them must be given",
                ));
            }
            (Some(index), _) if !active.contains(&index) && !force => {
                return Err(Error::invalid(format!(
                    "Given keyslot {index} is already erased (inactive) "
                )));
            }
            (Some(index), Some(old)) if !self.opens(index, old).await? => {
                return Err(Error::invalid(format!(
                    "Given keyslot {index} doesn't contain the given old password for erase operation"
                )));
            }
            (Some(index), _) => vec![index],
            (None, Some(old)) => self.opened_by(old).await?,
        };
        let all = active.iter().all(|index| doomed.contains(index));
        match slot {
            Some(index) if all && !force => {
                return Err(Error::invalid(format!(
                    "Attempt to erase the only active keyslot {index} which will erase all the data in \
                     the image irreversibly - refusing operation"
                )));
            }
            None if doomed.is_empty() => {
                return Err(Error::invalid(
                    "No keyslots match given (old) password for erase operation",
                ));
            }
            None if all && !force => {
                return Err(Error::invalid(
                    "All the active keyslots match the (old) password that was given and erasing them \
                     will erase all the data in the image irreversibly - refusing operation",
                ));
            }
            _ => {}
        }
        for index in doomed {
            self.wipe(index).await?;
        }
        Ok(())
    }

    async fn opens(&self, index: usize, password: &Secret) -> Result<bool> {
        self.header.check_work()?;
        let key = unlock_slot(self.file, self.place, &self.header, index, password).await?;
        Ok(key.is_some())
    }

    async fn opened_by(&self, password: &Secret) -> Result<Vec<usize>> {
        let mut found = Vec::new();
        for index in self.active() {
            if self.opens(index, password).await? {
                found.push(index);
            }
        }
        Ok(found)
    }

    /// Stores the master key in a slot, encrypted with `password`. The last write changes only the four bytes that make the
    /// slot active.
    async fn fill(
        &mut self,
        index: usize,
        password: &Secret,
        key: &Secret,
        iter_time: u64,
    ) -> Result<()> {
        let (header, password, key) = (self.header.clone(), password.clone(), key.clone());
        let sealed = oxblk_ring::offload(move || header.seal(index, &password, &key, iter_time));
        let (slot, material) = sealed.await?;
        let mut after = self.header.clone();
        if let Some(entry) = after.slots.get_mut(index) {
            *entry = slot.clone();
        }
        after.check_work()?;
        if self.header.slots.get(index).is_some_and(|slot| slot.active) {
            self.put(index, &self.without_key(index)?).await?;
        }
        self.write(slot.material(self.header.suite).start, material).await?;
        let mut waiting = slot.clone();
        waiting.active = false;
        self.put(index, &waiting).await?;
        let state = slot.encode().get(..STATE).unwrap_or_default().to_vec();
        self.write(luks::Header::slot_offset(index), state).await?;
        self.note(index, slot);
        Ok(())
    }

    fn without_key(&self, index: usize) -> Result<Slot> {
        let slot = self.header.slots.get(index);
        Ok(slot.ok_or_else(|| Error::from_errno(Errno::INVAL))?.erased())
    }

    /// Overwrites the key material of a slot with random bytes, and then makes the slot inactive.
    async fn wipe(&mut self, index: usize) -> Result<()> {
        let erased = self.without_key(index)?;
        let material = erased.material(self.header.suite);
        let len = material.end.saturating_sub(material.start);
        let mut noise = vec![0; usize::try_from(len).map_err(|_| Error::from_errno(Errno::FBIG))?];
        random::fill(&mut noise)?;
        self.write(material.start, noise).await?;
        self.put(index, &erased).await?;
        self.note(index, erased);
        Ok(())
    }

    /// Writes a key slot of the LUKS header.
    async fn put(&self, index: usize, slot: &Slot) -> Result<()> {
        self.write(luks::Header::slot_offset(index), slot.encode().to_vec()).await
    }

    /// Writes bytes of the LUKS header or of the key material, and flushes.
    async fn write(&self, offset: u64, bytes: Vec<u8>) -> Result<()> {
        let end = offset.saturating_add(u64::try_from(bytes.len()).unwrap_or(u64::MAX));
        if end > self.place.length {
            return Err(Error::invalid("Request for data outside of extension header"));
        }
        let at = self.place.offset.saturating_add(offset);
        self.file.write(at, IoBuf::from(bytes), WriteFlags::empty()).await?;
        self.file.flush().await
    }

    /// Updates a slot of the header in memory after it has changed on disk.
    fn note(&mut self, index: usize, slot: Slot) {
        if let Some(entry) = self.header.slots.get_mut(index) {
            *entry = slot;
        }
    }
}
