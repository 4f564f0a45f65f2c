//! Index records <-> protobuf.
//!
//! Records are encoded and decoded one message at a time, never as one `ShardIndex` message. The
//! bytes are the same, but memory then holds one message besides the records, and a count beyond
//! its limit is refused when it is reached rather than after it was allocated.
//!
//! Always holds: a decoded message is no longer in memory than some small multiple of its bytes
//! (strings and fixed-width lists are copied, nothing is recursive), and the number of messages of
//! each kind is bounded.

use dtr_proto::v1 as proto;
use prost::Message;
use prost::encoding::{self, DecodeContext, WireType};
use proto::node::{Key as ProtoKey, Value as ProtoValue};

use super::{
    ChunkRecord, GlobalSlice, Replica, STORAGES_MAX, ShardIndex, StorageRecord, TENSORS_MAX,
    TensorKind, TensorRecord,
};
use crate::codec::Codec;
use crate::format::FormatError;
use crate::format::layout::ElementType;
use crate::format::tree::{DictKind, Key, NODES_MAX, Node, Value};

// Field numbers of the `ShardIndex` message.
const NODES: u32 = 1;
const STORAGES: u32 = 2;
const TENSORS: u32 = 3;
const CHUNKS: u32 = 4;
const REPLICATED: u32 = 5;

/// Bytes that a chunk takes in its columns, and that all columns take besides: keys and lengths.
const CHUNK_WIRE_BYTES: u64 = 4 + 8 + 4 + 4 + 1 + 4 + 4;
const COLUMNS_WIRE_BYTES: u64 = 7 * (1 + 10);

/// The bytes of the `ShardIndex` message.
pub(super) fn encode(index: &ShardIndex) -> Vec<u8> {
    let mut wire = Vec::new();
    for node in &index.nodes {
        encoding::message::encode(NODES, &node_to_proto(node), &mut wire);
    }
    for storage in &index.storages {
        encoding::message::encode(STORAGES, &storage_to_proto(storage), &mut wire);
    }
    for tensor in &index.tensors {
        encoding::message::encode(TENSORS, &tensor_to_proto(tensor), &mut wire);
    }
    if !index.chunks.is_empty() {
        encoding::message::encode(CHUNKS, &chunks_to_proto(&index.chunks), &mut wire);
    }
    encoding::fixed32::encode_packed(REPLICATED, &index.replicated, &mut wire);
    wire
}

/// Reads the bytes of a `ShardIndex` message of at most `records_max` nodes, storages and tensors,
/// whose file has room for `chunks_max` chunks. Unknown fields are skipped: one that a reader must
/// know comes with an incompatible feature bit.
pub(super) fn decode(
    mut wire: &[u8],
    records_max: u64,
    chunks_max: u64,
) -> Result<ShardIndex, FormatError> {
    let mut index = ShardIndex::default();
    let mut columns = None;
    while !wire.is_empty() {
        check_records(&index, records_max)?;
        let (field, wire_type) =
            encoding::decode_key(&mut wire).map_err(|error| malformed(&error))?;
        match field {
            NODES => push(&mut index.nodes, NODES_MAX, &mut wire, wire_type, node_from_proto)?,
            STORAGES => {
                push(&mut index.storages, STORAGES_MAX, &mut wire, wire_type, storage_from_proto)?;
            }
            TENSORS => {
                push(&mut index.tensors, TENSORS_MAX, &mut wire, wire_type, tensor_from_proto)?;
            }
            CHUNKS => {
                let message = split_message(&mut wire, wire_type)?;
                ensure!(columns.is_none(), "the index has its chunks twice");
                columns = Some(decode_chunks(message, chunks_max)?);
            }
            REPLICATED => {
                let numbers = split_message(&mut wire, wire_type)?;
                ensure!(index.replicated.is_empty(), "the index has `replicated` twice");
                index.replicated = replicated_from_wire(numbers)?;
            }
            _ => encoding::skip_field(wire_type, field, &mut wire, DecodeContext::default())
                .map_err(|error| malformed(&error))?,
        }
    }
    check_records(&index, records_max)?;
    index.chunks = columns.unwrap_or_default();
    Ok(index)
}

fn check_records(index: &ShardIndex, records_max: u64) -> Result<(), FormatError> {
    ensure!(
        index.record_count() <= records_max,
        "the index unpacks to more than {records_max} nodes, storages and tensors, the most for \
         its stored bytes"
    );
    Ok(())
}

/// Takes one message off the wire, as a record.
fn push<M: Message + Default, R>(
    records: &mut Vec<R>,
    records_max: usize,
    wire: &mut &[u8],
    wire_type: WireType,
    convert: impl Fn(M) -> Result<R, String>,
) -> Result<(), FormatError> {
    let name = std::any::type_name::<M>().rsplit(':').next().unwrap_or_default();
    let number = records.len();
    ensure!(number < records_max, "the index has more than {records_max} `{name}` messages");
    let message = M::decode(split_message(wire, wire_type)?).map_err(|error| malformed(&error))?;
    let record = convert(message)
        .map_err(|why| FormatError::Damaged(format!("`{name}` message {number} {why}")))?;
    records.push(record);
    Ok(())
}

/// Takes the bytes of one length-delimited field off the wire.
fn split_message<'a>(wire: &mut &'a [u8], wire_type: WireType) -> Result<&'a [u8], FormatError> {
    ensure!(
        wire_type == WireType::LengthDelimited,
        "the index has a field of wire type {wire_type:?}, expected a message"
    );
    let length = encoding::decode_varint(wire).map_err(|error| malformed(&error))?;
    let split = usize::try_from(length).ok().and_then(|length| wire.split_at_checked(length));
    let Some((message, rest)) = split else {
        return Err(FormatError::Damaged(format!(
            "the index has a message of {length} bytes, and {} are left",
            wire.len()
        )));
    };
    *wire = rest;
    Ok(message)
}

/// Packed numbers, which take no more memory than on the wire.
fn replicated_from_wire(numbers: &[u8]) -> Result<Vec<u32>, FormatError> {
    let (numbers, rest) = numbers.as_chunks::<4>();
    ensure!(rest.is_empty(), "the index's `replicated` is cut short");
    Ok(numbers.iter().map(|number| u32::from_le_bytes(*number)).collect())
}

fn decode_chunks(message: &[u8], chunks_max: u64) -> Result<Vec<ChunkRecord>, FormatError> {
    let bytes_max = chunks_max.saturating_mul(CHUNK_WIRE_BYTES).saturating_add(COLUMNS_WIRE_BYTES);
    ensure!(
        message.len() as u64 <= bytes_max,
        "the chunk columns take {} bytes, and a file with room for {chunks_max} chunks has at most \
         {bytes_max}",
        message.len()
    );
    let columns = proto::ChunkColumns::decode(message).map_err(|error| malformed(&error))?;
    chunks_from_proto(&columns)
}

fn malformed(error: &prost::DecodeError) -> FormatError {
    FormatError::Damaged(format!("the index is not a valid message: {error}"))
}

/// A node's bytes.
pub(super) fn node_bytes(node: &Node) -> Vec<u8> {
    node_to_proto(node).encode_to_vec()
}

/// A tensor's bytes.
pub(super) fn tensor_bytes(tensor: &TensorRecord) -> Vec<u8> {
    tensor_to_proto(tensor).encode_to_vec()
}

fn node_to_proto(node: &Node) -> proto::Node {
    proto::Node {
        key: node.key.as_ref().map(key_to_proto),
        value: Some(value_to_proto(&node.value)),
    }
}

fn node_from_proto(node: proto::Node) -> Result<Node, String> {
    let value = node.value.ok_or("has no value that this version knows")?;
    Ok(Node { key: node.key.map(key_from_proto), value: value_from_proto(value)? })
}

fn key_to_proto(key: &Key) -> ProtoKey {
    match key {
        Key::Str(text) => ProtoKey::KeyStr(text.clone()),
        Key::Int(value) => ProtoKey::KeyInt(*value),
        Key::BigInt(bytes) => ProtoKey::KeyBigInt(bytes.clone()),
        Key::Bool(value) => ProtoKey::KeyBool(*value),
        Key::Float(value) => ProtoKey::KeyFloat(*value),
        Key::Bytes(bytes) => ProtoKey::KeyBytes(bytes.clone()),
        Key::None => ProtoKey::KeyNone(proto::Unit {}),
    }
}

fn key_from_proto(key: ProtoKey) -> Key {
    match key {
        ProtoKey::KeyStr(text) => Key::Str(text),
        ProtoKey::KeyInt(value) => Key::Int(value),
        ProtoKey::KeyBigInt(bytes) => Key::BigInt(bytes),
        ProtoKey::KeyBool(value) => Key::Bool(value),
        ProtoKey::KeyFloat(value) => Key::Float(value),
        ProtoKey::KeyBytes(bytes) => Key::Bytes(bytes),
        ProtoKey::KeyNone(proto::Unit {}) => Key::None,
    }
}

fn value_to_proto(value: &Value) -> ProtoValue {
    match value {
        Value::None => ProtoValue::None(proto::Unit {}),
        Value::Bool(value) => ProtoValue::Bool(*value),
        Value::Int(value) => ProtoValue::Int(*value),
        Value::BigInt(bytes) => ProtoValue::BigInt(bytes.clone()),
        Value::Float(value) => ProtoValue::Float(*value),
        Value::Complex(real, imaginary) => {
            let (real_bits, imaginary_bits) = (real.to_bits(), imaginary.to_bits());
            ProtoValue::Complex(proto::Complex { real_bits, imaginary_bits })
        }
        Value::Str(text) => ProtoValue::Str(text.clone()),
        Value::Bytes(bytes) => ProtoValue::Bytes(bytes.clone()),
        Value::Tensor(tensor) => ProtoValue::Tensor(*tensor),
        Value::NumpyScalar { dtype, bytes } => ProtoValue::NumpyScalar(proto::NumpyScalar {
            dtype: dtype.clone(),
            bytes: bytes.clone(),
        }),
        Value::TorchDtype(name) => ProtoValue::TorchDtype(name.clone()),
        Value::TorchDevice(name) => ProtoValue::TorchDevice(name.clone()),
        Value::TorchSize(items) => ProtoValue::TorchSize(proto::Int64List { items: items.clone() }),
        Value::NumpyDtype(name) => ProtoValue::NumpyDtype(name.clone()),
        Value::Dict { len, kind, metadata } => {
            ProtoValue::Dict(proto::Dict { len: *len, kind: *kind as i32, metadata: *metadata })
        }
        Value::List { len } => ProtoValue::List(*len),
        Value::Tuple { len } => ProtoValue::Tuple(*len),
    }
}

fn value_from_proto(value: ProtoValue) -> Result<Value, String> {
    Ok(match value {
        ProtoValue::None(proto::Unit {}) => Value::None,
        ProtoValue::Bool(value) => Value::Bool(value),
        ProtoValue::Int(value) => Value::Int(value),
        ProtoValue::BigInt(bytes) => Value::BigInt(bytes),
        ProtoValue::Float(value) => Value::Float(value),
        ProtoValue::Complex(proto::Complex { real_bits, imaginary_bits }) => {
            Value::Complex(f64::from_bits(real_bits), f64::from_bits(imaginary_bits))
        }
        ProtoValue::Str(text) => Value::Str(text),
        ProtoValue::Bytes(bytes) => Value::Bytes(bytes),
        ProtoValue::Tensor(tensor) => Value::Tensor(tensor),
        ProtoValue::NumpyScalar(proto::NumpyScalar { dtype, bytes }) => {
            Value::NumpyScalar { dtype, bytes }
        }
        ProtoValue::TorchDtype(name) => Value::TorchDtype(name),
        ProtoValue::TorchDevice(name) => Value::TorchDevice(name),
        ProtoValue::TorchSize(proto::Int64List { items }) => Value::TorchSize(items),
        ProtoValue::NumpyDtype(name) => Value::NumpyDtype(name),
        ProtoValue::Dict(proto::Dict { len, kind, metadata }) => {
            Value::Dict { len, kind: dict_kind(kind)?, metadata }
        }
        ProtoValue::List(len) => Value::List { len },
        ProtoValue::Tuple(len) => Value::Tuple { len },
    })
}

fn dict_kind(number: i32) -> Result<DictKind, String> {
    let mut known = DictKind::ALL.into_iter();
    known
        .find(|kind| *kind as i32 == number)
        .ok_or_else(|| format!("is a dict of unknown kind {number}"))
}

fn storage_to_proto(storage: &StorageRecord) -> proto::Storage {
    proto::Storage {
        raw_offset: storage.raw_offset,
        bytes: storage.bytes,
        element: element_to_proto(storage.element).into(),
        replica: storage.replica.map(|part| proto::Replica {
            number: part.number,
            start: part.start,
            bytes: part.bytes,
        }),
    }
}

fn storage_from_proto(storage: proto::Storage) -> Result<StorageRecord, String> {
    let element = proto::ElementType::try_from(storage.element)
        .map_err(|_| format!("has unknown element type {}", storage.element))?;
    Ok(StorageRecord {
        raw_offset: storage.raw_offset,
        bytes: storage.bytes,
        element: element_from_proto(element),
        replica: storage.replica.map(|part| Replica {
            number: part.number,
            start: part.start,
            bytes: part.bytes,
        }),
    })
}

fn element_to_proto(element: ElementType) -> proto::ElementType {
    match element {
        ElementType::Bytes => proto::ElementType::Bytes,
        ElementType::F16 => proto::ElementType::F16,
        ElementType::Bf16 => proto::ElementType::Bf16,
        ElementType::F32 => proto::ElementType::F32,
        ElementType::F64 => proto::ElementType::F64,
    }
}

fn element_from_proto(element: proto::ElementType) -> ElementType {
    match element {
        proto::ElementType::Bytes => ElementType::Bytes,
        proto::ElementType::F16 => ElementType::F16,
        proto::ElementType::Bf16 => ElementType::Bf16,
        proto::ElementType::F32 => ElementType::F32,
        proto::ElementType::F64 => ElementType::F64,
    }
}

fn tensor_to_proto(tensor: &TensorRecord) -> proto::Tensor {
    let kind = match tensor.kind {
        TensorKind::Torch => proto::TensorKind::Torch,
        TensorKind::TorchParameter => proto::TensorKind::TorchParameter,
        TensorKind::Numpy => proto::TensorKind::Numpy,
    };
    proto::Tensor {
        storage: tensor.storage,
        kind: kind.into(),
        dtype: tensor.dtype.clone(),
        item_bytes: tensor.item_bytes,
        shape: tensor.shape.clone(),
        strides: tensor.strides.clone(),
        offset: tensor.offset,
        requires_grad: tensor.requires_grad,
        slice: tensor.slice.as_ref().map(|slice| proto::GlobalSlice {
            shape: slice.shape.clone(),
            offsets: slice.offsets.clone(),
        }),
    }
}

fn tensor_from_proto(tensor: proto::Tensor) -> Result<TensorRecord, String> {
    let kind = match proto::TensorKind::try_from(tensor.kind) {
        Ok(proto::TensorKind::Torch) => TensorKind::Torch,
        Ok(proto::TensorKind::TorchParameter) => TensorKind::TorchParameter,
        Ok(proto::TensorKind::Numpy) => TensorKind::Numpy,
        Ok(proto::TensorKind::Unspecified) | Err(_) => {
            return Err(format!("has unknown kind {}", tensor.kind));
        }
    };
    Ok(TensorRecord {
        storage: tensor.storage,
        kind,
        dtype: tensor.dtype,
        item_bytes: tensor.item_bytes,
        shape: tensor.shape,
        strides: tensor.strides,
        offset: tensor.offset,
        requires_grad: tensor.requires_grad,
        slice: tensor.slice.map(|slice| GlobalSlice { shape: slice.shape, offsets: slice.offsets }),
    })
}

fn chunks_to_proto(chunks: &[ChunkRecord]) -> proto::ChunkColumns {
    proto::ChunkColumns {
        segment: Vec::new(),
        offset: chunks.iter().map(|chunk| chunk.offset).collect(),
        stored_bytes: chunks.iter().map(|chunk| chunk.stored_bytes).collect(),
        raw_bytes: chunks.iter().map(|chunk| chunk.raw_bytes).collect(),
        codec: chunks.iter().map(|chunk| chunk.codec.id()).collect(),
        stored_crc32c: chunks.iter().map(|chunk| chunk.stored_crc32c).collect(),
        raw_crc32c: chunks.iter().map(|chunk| chunk.raw_crc32c).collect(),
    }
}

fn chunks_from_proto(columns: &proto::ChunkColumns) -> Result<Vec<ChunkRecord>, FormatError> {
    let length = columns.offset.len();
    for (name, other) in [
        ("stored_bytes", columns.stored_bytes.len()),
        ("raw_bytes", columns.raw_bytes.len()),
        ("codec", columns.codec.len()),
        ("stored_crc32c", columns.stored_crc32c.len()),
        ("raw_crc32c", columns.raw_crc32c.len()),
    ] {
        ensure!(other == length, "the chunk column `{name}` has {other} items, expected {length}");
    }
    ensure!(
        columns.segment.is_empty()
            || (columns.segment.len() == length && columns.segment.iter().all(|part| *part == 0)),
        "the chunk column `segment` names segment files, which this version does not know"
    );
    (0..length)
        .map(|i| {
            Ok(ChunkRecord {
                offset: columns.offset[i],
                stored_bytes: columns.stored_bytes[i],
                raw_bytes: columns.raw_bytes[i],
                codec: codec_from_byte(columns.codec[i], i)?,
                stored_crc32c: columns.stored_crc32c[i],
                raw_crc32c: columns.raw_crc32c[i],
            })
        })
        .collect()
}

fn codec_from_byte(byte: u8, chunk: usize) -> Result<Codec, FormatError> {
    Codec::from_id(byte)
        .ok_or_else(|| FormatError::Damaged(format!("chunk {chunk} has unknown codec {byte}")))
}
