//! The staging arena: its owner, and when it grows.
//!
//! Always holds: a save, a loan and a call that prewarms or pins it take turns; while it is lent or
//! a save is in flight nobody else gets it; it is replaced only by a larger one, or because buffers
//! of it did not come back; of two engines, one owns it.

use std::sync::Arc;
use std::time::Duration;

use super::{Inner, Saving, memory};
use crate::Result;
use crate::error::IoContext;
use crate::io::buffer::{BufferPool, Slab};
use crate::io::pin::Pin;

impl Inner {
    /// Allocates and populates the arena; see [`Engine::prewarm`](super::Engine::prewarm).
    pub(super) fn prewarm(&self, raw_bytes: u64) -> Result<()> {
        let mut saving = self.turn();
        if let Some(last) = self.last() {
            last.wait(None);
        }
        let arena = self.arena(&mut saving, raw_bytes)?;
        arena
            .prewarm(self.core.workers)
            .context("populating the staging arena for", self.core.store.location())
    }

    /// Lends the staging arena; see [`Engine::lend_staging`](super::Engine::lend_staging).
    pub(super) fn lend(&self, bytes: u64, grows_to: Option<u64>) -> Result<Option<Slab>> {
        // The holder takes a snapshot, or is about to.
        let Ok(mut saving) = self.saving.try_lock() else { return Ok(None) };
        if !self.is_idle() {
            return Ok(None);
        }
        let config = &self.core.config;
        let chunk_bytes = u64::from(config.chunk_bytes);
        let suffices = |chunks: u64| bytes <= chunks.saturating_mul(chunk_bytes);
        match &saving.arena {
            Some(arena) if suffices(arena.count() as u64) => {
                return Ok(BufferPool::try_take_all(arena));
            }
            // Lent already: another one beside it would be twice the memory.
            Some(arena) if arena.free() < arena.count() => return Ok(None),
            _ => {}
        }
        let Some(raw_bytes) = grows_to.map(|raw_bytes| raw_bytes.max(bytes)) else {
            return Ok(None);
        };
        if !suffices(memory::arena_chunks(config, raw_bytes, memory::memory_bytes())) {
            return Ok(None);
        }
        Ok(BufferPool::try_take_all(&self.arena(&mut saving, raw_bytes)?))
    }

    /// Takes another engine's staging arena; see
    /// [`Engine::take_staging_of`](super::Engine::take_staging_of).
    pub(super) fn take_arena_of(&self, other: &Self) {
        // Two engines that take each other's must not wait for each other.
        let (Ok(mut own), Ok(mut others)) = (self.saving.try_lock(), other.saving.try_lock())
        else {
            return;
        };
        if own.arena.is_some() || !other.is_idle() {
            return;
        }
        let fits = |arena: &mut Arc<BufferPool>| self.could_have_made(arena);
        if let Some(arena) = others.arena.take_if(fits) {
            if let Some(pin) = &own.pin {
                pin_arena(&arena, pin.as_ref());
            }
            own.arena = Some(arena);
        }
    }

    /// Whether an arena is whole, and no larger than this engine's may be.
    fn could_have_made(&self, arena: &BufferPool) -> bool {
        let config = &self.core.config;
        let chunks_max = memory::arena_chunks(config, u64::MAX, memory::memory_bytes());
        arena.buffer_bytes() == config.chunk_bytes as usize
            && arena.count() as u64 <= chunks_max
            && arena.free() == arena.count()
    }

    /// Whether no save is in flight.
    fn is_idle(&self) -> bool {
        self.last().is_none_or(|last| last.wait(Some(Duration::ZERO)))
    }

    /// Has the staging arena registered with a device's driver, as it is and as it will be.
    pub(super) fn pin(&self, pin: &Arc<dyn Pin>) {
        let mut saving = self.turn();
        if let Some(arena) = &saving.arena {
            pin_arena(arena, pin.as_ref());
        }
        saving.pin = Some(Arc::clone(pin));
    }

    /// The staging arena, grown if this state wants more than it has. No save is in flight.
    pub(super) fn arena(&self, saving: &mut Saving, raw_bytes: u64) -> Result<Arc<BufferPool>> {
        if let Some(last) = self.last() {
            // Copies of a save that failed may still be under way.
            last.wait_captured(None);
        }
        let config = &self.core.config;
        let wanted = memory::arena_chunks(config, raw_bytes, memory::memory_bytes());
        let wanted = usize::try_from(wanted).unwrap_or(usize::MAX);
        match &saving.arena {
            // A failed device may have kept buffers for good: such an arena is replaced.
            Some(arena) if wanted <= arena.count() && arena.free() == arena.count() => {
                Ok(Arc::clone(arena))
            }
            _ => {
                // The old one goes first, so that both never count at once.
                saving.arena = None;
                let arena = BufferPool::new(config.chunk_bytes as usize, wanted)
                    .context("allocating the staging arena for", self.core.store.location())?;
                if let Some(pin) = &saving.pin {
                    populate(&arena, self.core.workers);
                    pin_arena(&arena, pin.as_ref());
                }
                saving.arena = Some(Arc::clone(&arena));
                Ok(arena)
            }
        }
    }
}

/// Gives an arena that is about to be pinned its memory, by all workers: the driver would fetch it
/// page after page by one thread.
fn populate(arena: &BufferPool, threads: usize) {
    if let Err(error) = arena.prewarm(threads) {
        tracing::warn!(%error, "the staging arena was not populated before it is pinned");
    }
}

/// Copies from devices work without it, at a fraction of the rate.
fn pin_arena(arena: &BufferPool, pin: &dyn Pin) {
    if let Err(error) = arena.pin(pin) {
        tracing::warn!(%error, "the staging arena is not pinned: copies from devices are slow");
    }
}
