//! Python's memory as the engine reads and fills it: torch storages by address, numpy arrays
//! through their C interface, mapped shards and lent memory as arrays.
//!
//! Why safe code is not enough: torch hands out addresses, not buffers (`memoryview(tensor)` is a
//! `TypeError`, and DLPack refuses some dtypes), and copying through Python objects would double
//! the memory and the time. Always holds: a [`HostSource`] or a target is used only while the call
//! that got it runs, during which Python's arguments keep the memory's owner alive; every access is
//! checked against the length that came with the address.
#![expect(unsafe_code, reason = "torch's and numpy's memory is reached by address")]

use dtr_engine::format::layout::ElementType;
use dtr_engine::io::Slab;
use dtr_engine::load::{MappedShard, Target};
use dtr_engine::save::StorageSource;
use dtr_engine::{EngineError, Result};
use numpy::ndarray::ArrayView1;
use numpy::npyffi::NPY_ARRAY_WRITEABLE;
use numpy::{PyArray1, PyArrayDescrMethods, PyUntypedArray, PyUntypedArrayMethods};
use pyo3::prelude::*;
use pyo3::types::PyTuple;

use crate::manager::misuse;

/// Size of a huge page where it matters.
const HUGE_PAGE_BYTES: usize = 2 << 20;

/// Contiguous memory at `address` that stands at byte `at` of a storage.
#[derive(Clone, Copy, Debug)]
struct Piece {
    address: usize,
    bytes: usize,
    at: u64,
}

impl Piece {
    fn end(&self) -> u64 {
        self.at + self.bytes as u64
    }
}

/// A storage in the host's memory to save: pieces laid end to end.
#[derive(Debug)]
pub(crate) struct HostSource {
    element: ElementType,
    bytes: u64,
    pieces: Vec<Piece>,
}

impl HostSource {
    /// From `(element, bytes, memory)`, where memory is a contiguous array, a list of
    /// `(address, bytes, at)`, or None for one that is not read.
    pub(crate) fn extract(item: &Bound<'_, PyAny>) -> PyResult<Self> {
        let (element, bytes, memory): (u8, u64, Bound<'_, PyAny>) = item.extract()?;
        let py = item.py();
        let element = element_of(py, element)?;
        if memory.is_none() {
            return Ok(Self { element, bytes, pieces: Vec::new() });
        }
        let pieces = match memory.cast::<PyUntypedArray>() {
            Ok(array) => {
                let (address, bytes) = contiguous_memory(array)?;
                vec![Piece { address, bytes, at: 0 }]
            }
            Err(_) => memory
                .extract::<Vec<(usize, usize, u64)>>()?
                .into_iter()
                .map(|(address, bytes, at)| Piece { address, bytes, at })
                .collect(),
        };
        let laid_end_to_end =
            pieces.iter().try_fold(0, |end, piece| (piece.at == end).then(|| piece.end()));
        if laid_end_to_end != Some(bytes) {
            return Err(misuse(
                py,
                "reading a storage",
                format!("its pieces are not {bytes} bytes"),
            ));
        }
        Ok(Self { element, bytes, pieces })
    }

    pub(crate) fn bytes(&self) -> u64 {
        self.bytes
    }

    pub(crate) fn element(&self) -> ElementType {
        self.element
    }
}

impl StorageSource for HostSource {
    fn read(&self, offset: u64, destination: &mut [u8]) -> Result<()> {
        let mut next = self.pieces.partition_point(|piece| piece.end() <= offset);
        let mut at = offset;
        let mut rest = destination;
        while !rest.is_empty() {
            let Some(piece) = self.pieces.get(next) else {
                return Err(EngineError::internal(
                    format!("capturing a storage at offset {offset}"),
                    format!("it has {} bytes", self.bytes),
                ));
            };
            let skip = usize::try_from(at - piece.at).unwrap_or(piece.bytes);
            let count = rest.len().min(piece.bytes - skip);
            let (part, after) = rest.split_at_mut(count);
            // SAFETY: `skip + count` is at most `piece.bytes`, and the caller of `save` keeps the
            // memory valid while the engine captures; `part` is the arena's, so they are apart.
            // Another Python thread may write to a tensor meanwhile, as it may under any copy: the
            // bytes are then unspecified, and only bytes.
            unsafe {
                let source = std::ptr::with_exposed_provenance::<u8>(piece.address + skip);
                dtr_engine::copy_from(source, part);
            }
            at += count as u64;
            next += 1;
            rest = after;
        }
        Ok(())
    }
}

pub(crate) fn element_of(py: Python<'_>, number: u8) -> PyResult<ElementType> {
    let known = ElementType::ALL.into_iter().find(|element| *element as u8 == number);
    known.ok_or_else(|| misuse(py, "reading a storage", format!("unknown element {number}")))
}

/// Memory to fill with a part of a storage.
#[derive(Debug)]
pub(crate) struct FreshMemory {
    storage: u32,
    offset: u64,
    address: usize,
    bytes: usize,
}

impl FreshMemory {
    /// From `(storage, offset, array)` or `(storage, offset, (address, bytes))`. Whoever gives an
    /// address vouches that nothing else uses the memory until the read returns.
    pub(crate) fn extract(item: &Bound<'_, PyAny>) -> PyResult<Self> {
        let (storage, offset, memory): (u32, u64, Bound<'_, PyAny>) = item.extract()?;
        let (address, bytes) = match memory.cast::<PyUntypedArray>() {
            Ok(array) => writable_memory(array)?,
            Err(_) => memory.cast::<PyTuple>()?.extract()?,
        };
        Ok(Self { storage, offset, address, bytes })
    }

    pub(crate) fn bytes(&self) -> usize {
        self.bytes
    }

    /// Asks for huge pages for fresh memory: first-touch faults of small pages cost more than
    /// reading the bytes. The whole pages around it are meant, for large allocations lie side by
    /// side: where both ask, one huge page holds the end of one and the start of the next.
    pub(crate) fn advise_huge_pages(&self) {
        if self.bytes < HUGE_PAGE_BYTES / 2 {
            return;
        }
        let page_bytes = rustix::param::page_size();
        let start = self.address / page_bytes * page_bytes;
        let end = (self.address + self.bytes).next_multiple_of(page_bytes);
        // SAFETY: each page of the range holds mapped memory of ours; this advice changes no
        // contents of ours or of whatever else is there.
        let advised = unsafe {
            rustix::mm::madvise(
                std::ptr::with_exposed_provenance_mut(start),
                end - start,
                rustix::mm::Advice::LinuxHugepage,
            )
        };
        if let Err(error) = advised {
            tracing::debug!(%error, "huge pages were refused for loaded memory");
        }
    }

    /// The memory as the engine fills it.
    pub(crate) fn target(&mut self) -> Target<'_> {
        let memory: &mut [u8] = if self.bytes == 0 {
            &mut []
        } else {
            let start = std::ptr::with_exposed_provenance_mut::<u8>(self.address);
            // SAFETY: the address and length come from one allocation, which the caller keeps alive
            // and to itself until the read returns; any byte pattern is a valid `u8`.
            unsafe { std::slice::from_raw_parts_mut(start, self.bytes) }
        };
        Target { storage: self.storage, offset: self.offset, memory }
    }
}

/// Address and length of a contiguous array.
fn contiguous_memory(array: &Bound<'_, PyUntypedArray>) -> PyResult<(usize, usize)> {
    if !array.is_c_contiguous() && !array.is_fortran_contiguous() {
        return Err(misuse(array.py(), "reading an array", "it is not contiguous"));
    }
    let bytes = array.len() * array.dtype().itemsize();
    // SAFETY: the pointer is to the live array object that `array` refers to.
    let data = unsafe { (*array.as_array_ptr()).fields.data };
    Ok((data.expose_provenance(), bytes))
}

fn writable_memory(array: &Bound<'_, PyUntypedArray>) -> PyResult<(usize, usize)> {
    // SAFETY: the pointer is to the live array object that `array` refers to.
    let flags = unsafe { (*array.as_array_ptr()).fields.flags };
    if flags & NPY_ARRAY_WRITEABLE == 0 {
        return Err(misuse(array.py(), "filling an array", "it is read-only"));
    }
    contiguous_memory(array)
}

/// A mapped shard, kept alive by the arrays that view it.
#[pyclass(frozen, module = "dtruntime._native")]
#[derive(Debug)]
pub(crate) struct MappedMemory {
    _shard: MappedShard,
}

/// The whole mapping as an array of bytes, writable and private to this process.
pub(crate) fn array_of_mapping(
    py: Python<'_>,
    mut shard: MappedShard,
) -> PyResult<Bound<'_, PyArray1<u8>>> {
    let bytes = shard.bytes_mut();
    // From what may be written: the array writes by way of this address.
    let (start, length) = (bytes.as_mut_ptr(), bytes.len());
    let owner = Bound::new(py, MappedMemory { _shard: shard })?;
    // SAFETY: so many bytes from there on are mapped, and nothing in Rust uses them after this.
    let view = unsafe { ArrayView1::from_shape_ptr(length, start.cast_const()) };
    // SAFETY: the mapping lives as long as `owner`, which the array holds, and never moves. It is
    // private and writable.
    Ok(unsafe { PyArray1::borrow_from_array(&view, owner.clone().into_any()) })
}

/// Memory of the engine's that is lent, kept by the arrays that view it.
#[pyclass(frozen, module = "dtruntime._native")]
#[derive(Debug)]
pub(crate) struct LentMemory {
    slab: Slab,
}

/// Lent memory as an array of bytes; it goes back when nothing views it any more.
pub(crate) fn array_of_slab(py: Python<'_>, slab: Slab) -> PyResult<Bound<'_, PyArray1<u8>>> {
    let owner = Bound::new(py, LentMemory { slab })?;
    let slab = &owner.get().slab;
    // SAFETY: so many bytes from there on are mapped and initialised, to which the slab is the only
    // access.
    let view = unsafe { ArrayView1::from_shape_ptr(slab.bytes(), slab.start().cast_const()) };
    // SAFETY: the memory lives as long as `owner`, which the array holds, and never moves. It is
    // writable, and nothing in Rust reads it.
    Ok(unsafe { PyArray1::borrow_from_array(&view, owner.clone().into_any()) })
}
