//! A committed checkpoint as Python reads it.

use std::collections::BTreeMap;
use std::sync::Arc;

use dtr_cuda::Direction;
use dtr_engine::Result;
use dtr_engine::load::{self, ReadOptions};
use numpy::PyArray1;
use pyo3::prelude::*;
use pyo3::types::PyList;

use crate::device::{self, Streams, Target};
use crate::errors::json_to_python;
use crate::guard::Guard;
use crate::tensor::array_of_mapping;
use crate::tree;

/// Bytes that are read without looking for signals.
const READ_BATCH_BYTES: usize = 1 << 30;

/// One rank's shard of a checkpoint, its manifest and index read and checked.
#[pyclass(frozen, module = "dtruntime._native")]
#[derive(Debug)]
pub(crate) struct Checkpoint {
    inner: Arc<load::Checkpoint>,
    guard: Guard,
}

impl Checkpoint {
    pub(crate) fn new(inner: load::Checkpoint, guard: Guard) -> Self {
        Self { inner: Arc::new(inner), guard }
    }

    pub(crate) fn inner(&self) -> &load::Checkpoint {
        &self.inner
    }

    fn what(&self) -> String {
        format!("reading `{}`", self.inner.shard_name())
    }

    /// Reads into host and devices; the stored bytes read.
    fn read_batch(&self, batch: &mut [Target], verify: bool) -> Result<u64> {
        let destinations: Vec<_> =
            batch.iter().map(device::destination_of).collect::<Result<_>>()?;
        let pairs = batch.iter().zip(&destinations);
        let device_targets = pairs.filter_map(|(target, memory)| {
            memory.as_ref().and_then(|memory| device::device_target(target, memory))
        });
        let device_targets = device_targets.collect();
        let mut targets = Vec::with_capacity(batch.len());
        for target in batch {
            if let Target::Host(memory) = target {
                memory.advise_huge_pages();
                targets.push(memory.target());
            }
        }
        let options = ReadOptions { verify, ..ReadOptions::default() };
        Ok(self.inner.read_to(targets, device_targets, options)?.stored_bytes)
    }
}

#[pymethods]
impl Checkpoint {
    /// The training step.
    #[getter]
    fn step(&self) -> u64 {
        self.inner.step()
    }

    /// The attempt that wrote it: another attempt at the same step is another checkpoint.
    #[getter]
    fn attempt(&self) -> &str {
        &self.inner.manifest().attempt
    }

    /// The manifest as a dict.
    fn manifest<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        json_to_python(py, self.inner.manifest())
    }

    /// The state tree in preorder: `(tag, payload)` or `(tag, payload, key)`.
    fn nodes<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyList>> {
        tree::nodes_to_python(py, &self.inner.index().nodes)
    }

    /// Display path of each node, in the order of `nodes`.
    fn paths(&self) -> Vec<String> {
        tree::paths(&self.inner.index().nodes)
    }

    /// Topmost nodes of what all ranks saved alike, ascending: everything at and below them.
    fn replicated(&self) -> Vec<u32> {
        self.inner.index().replicated.clone()
    }

    /// Whether only that may be loaded, since another number of ranks saved the checkpoint.
    #[getter]
    fn is_replicated_only(&self) -> bool {
        self.inner.is_replicated_only()
    }

    /// The tensors: `(storage, kind, dtype, item bytes, shape, strides, offset, requires_grad,
    /// slice)`, where `slice` is None, or the `(shape, offsets)` of where this is a part of a
    /// larger one.
    fn tensors<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyList>> {
        tree::tensors_to_python(py, &self.inner.index().tensors)
    }

    /// Bytes of each storage.
    fn storages(&self) -> Vec<u64> {
        self.inner.index().storages.iter().map(|storage| storage.bytes).collect()
    }

    /// Raw bytes that the rank's shard holds, which a save of the same state stages.
    #[getter]
    fn held_bytes(&self) -> u64 {
        self.inner.held_bytes()
    }

    /// Fills memory: each target is `(storage, offset, memory)`, where memory is an array,
    /// `(address, bytes)`, or `(device, address, bytes)`, which is filled after what `streams` have
    /// been given so far. Returns the stored bytes read. After an error, targets hold unspecified
    /// bytes.
    #[pyo3(signature = (targets, verify, streams=Vec::new()))]
    #[expect(clippy::needless_pass_by_value, reason = "made from a Python list")]
    fn read(
        &self,
        py: Python<'_>,
        targets: &Bound<'_, PyList>,
        verify: bool,
        streams: Streams,
    ) -> PyResult<u64> {
        let mut memory =
            targets.iter().map(|item| Target::extract(&item)).collect::<PyResult<Vec<_>>>()?;
        let mut stored_bytes = 0;
        self.guard.call(py, &self.what(), || device::follow(Direction::Up, &streams))?;
        for batch in batches(&mut memory) {
            stored_bytes += self.guard.call(py, &self.what(), || self.read_batch(batch, verify))?;
            py.check_signals()?;
        }
        Ok(stored_bytes)
    }

    /// Maps the shard: an array of all its bytes, and where in it each of `storages` lies that is
    /// stored raw and in one piece, as `{storage: (start, end)}`.
    #[expect(clippy::type_complexity, reason = "a pair, spelled out once")]
    fn map<'py>(
        &self,
        py: Python<'py>,
        storages: Vec<u32>,
        verify: bool,
    ) -> PyResult<(Bound<'py, PyArray1<u8>>, BTreeMap<u32, (usize, usize)>)> {
        let mapped = self.guard.call(py, &self.what(), || self.inner.map(&storages, verify))?;
        let ranges = storages
            .into_iter()
            .filter_map(|storage| {
                mapped.range_of(storage).map(|range| (storage, (range.start, range.end)))
            })
            .collect();
        Ok((array_of_mapping(py, mapped)?, ranges))
    }
}

/// Cuts targets into runs of about [`READ_BATCH_BYTES`].
fn batches(mut memory: &mut [Target]) -> impl Iterator<Item = &mut [Target]> {
    std::iter::from_fn(move || {
        if memory.is_empty() {
            return None;
        }
        let mut bytes = 0_usize;
        let full = memory.iter().position(|target| {
            bytes = bytes.saturating_add(target.bytes());
            bytes >= READ_BATCH_BYTES
        });
        let count = full.map_or(memory.len(), |position| position + 1);
        let (batch, rest) = std::mem::take(&mut memory).split_at_mut(count);
        memory = rest;
        Some(batch)
    })
}
