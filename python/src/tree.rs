//! The state tree and the tensor records, between Python's tuples and the engine's types.
//!
//! A node is `(tag, payload)`, or `(tag, payload, key)` for an entry of a dict; the tags have the
//! same numbers in `dtruntime/state/state_tree.py`. Always holds: what goes one way comes back
//! equal the other way.

use dtr_engine::format::index::{GlobalSlice, TensorKind, TensorRecord};
use dtr_engine::format::tree::{DictKind, Key, Node, Value, Walk};
use pyo3::IntoPyObjectExt;
use pyo3::prelude::*;
use pyo3::types::{
    PyBool, PyBytes, PyComplex, PyComplexMethods, PyFloat, PyInt, PyList, PyString, PyTuple,
};

use crate::manager::misuse;

const NONE: u8 = 0;
const BOOL: u8 = 1;
const INT: u8 = 2;
const FLOAT: u8 = 3;
const COMPLEX: u8 = 4;
const STR: u8 = 5;
const BYTES: u8 = 6;
const TENSOR: u8 = 7;
const NUMPY_SCALAR: u8 = 8;
const TORCH_DTYPE: u8 = 9;
const TORCH_DEVICE: u8 = 10;
const TORCH_SIZE: u8 = 11;
const NUMPY_DTYPE: u8 = 12;
const DICT: u8 = 13;
const LIST: u8 = 14;
const TUPLE: u8 = 15;

/// Display path of each node, in order.
pub(crate) fn paths(nodes: &[Node]) -> Vec<String> {
    let mut walk = Walk::new(nodes);
    let mut paths = Vec::with_capacity(nodes.len());
    while walk.advance().is_some() {
        paths.push(walk.path().to_string());
    }
    paths
}

/// Display path of each of `nodes`, tuples as `Manager.save` takes them.
#[pyfunction]
pub(crate) fn paths_of(nodes: &Bound<'_, PyList>) -> PyResult<Vec<String>> {
    Ok(paths(&nodes_from_python(nodes)?))
}

/// Nodes in preorder from a list of tuples.
pub(crate) fn nodes_from_python(nodes: &Bound<'_, PyList>) -> PyResult<Vec<Node>> {
    nodes.iter().map(|node| node_from_python(node.cast::<PyTuple>()?)).collect()
}

fn node_from_python(node: &Bound<'_, PyTuple>) -> PyResult<Node> {
    let tag: u8 = node.get_item(0)?.extract()?;
    let value = value_from_python(tag, &node.get_item(1)?)?;
    let key = if node.len() > 2 { Some(key_from_python(&node.get_item(2)?)?) } else { None };
    Ok(Node { key, value })
}

fn value_from_python(tag: u8, payload: &Bound<'_, PyAny>) -> PyResult<Value> {
    Ok(match tag {
        NONE => Value::None,
        BOOL => Value::Bool(payload.extract()?),
        INT => match integer_from_python(payload)? {
            Integer::Small(value) => Value::Int(value),
            Integer::Big(bytes) => Value::BigInt(bytes),
        },
        FLOAT => Value::Float(payload.extract()?),
        COMPLEX => {
            let complex = payload.cast::<PyComplex>()?;
            Value::Complex(complex.real(), complex.imag())
        }
        STR => Value::Str(payload.extract()?),
        BYTES => Value::Bytes(payload.cast::<PyBytes>()?.as_bytes().to_vec()),
        TENSOR => Value::Tensor(payload.extract()?),
        NUMPY_SCALAR => {
            let (dtype, bytes): (String, Bound<'_, PyBytes>) = payload.extract()?;
            Value::NumpyScalar { dtype, bytes: bytes.as_bytes().to_vec() }
        }
        TORCH_DTYPE => Value::TorchDtype(payload.extract()?),
        TORCH_DEVICE => Value::TorchDevice(payload.extract()?),
        TORCH_SIZE => Value::TorchSize(payload.extract()?),
        NUMPY_DTYPE => Value::NumpyDtype(payload.extract()?),
        DICT => {
            let (len, kind, metadata): (u32, u8, bool) = payload.extract()?;
            let known = DictKind::ALL.into_iter().find(|known| *known as u8 == kind);
            let kind = known.ok_or_else(|| {
                misuse(payload.py(), "reading a state tree", format!("unknown dict {kind}"))
            })?;
            Value::Dict { len, kind, metadata }
        }
        LIST => Value::List { len: payload.extract()? },
        TUPLE => Value::Tuple { len: payload.extract()? },
        _ => {
            return Err(misuse(payload.py(), "reading a state tree", format!("unknown tag {tag}")));
        }
    })
}

fn key_from_python(key: &Bound<'_, PyAny>) -> PyResult<Key> {
    if let Ok(text) = key.cast::<PyString>() {
        return Ok(Key::Str(text.to_str()?.to_owned()));
    }
    // Before integers: a bool is one.
    if let Ok(value) = key.cast::<PyBool>() {
        return Ok(Key::Bool(value.is_true()));
    }
    if key.is_none() {
        return Ok(Key::None);
    }
    if let Ok(value) = key.cast::<PyFloat>() {
        return Ok(Key::Float(value.extract()?));
    }
    if let Ok(bytes) = key.cast::<PyBytes>() {
        return Ok(Key::Bytes(bytes.as_bytes().to_vec()));
    }
    Ok(match integer_from_python(key)? {
        Integer::Small(value) => Key::Int(value),
        Integer::Big(bytes) => Key::BigInt(bytes),
    })
}

enum Integer {
    Small(i64),
    Big(Vec<u8>),
}

fn integer_from_python(value: &Bound<'_, PyAny>) -> PyResult<Integer> {
    let value = value.cast::<PyInt>()?;
    if let Ok(small) = value.extract::<i64>() {
        return Ok(Integer::Small(small));
    }
    // One bit for the sign: a negative number's complement shows how many it needs.
    let negative = value.lt(0)?;
    let magnitude = if negative { value.bitnot()? } else { value.clone().into_any() };
    let bits: usize = magnitude.call_method0("bit_length")?.extract()?;
    let options = pyo3::types::PyDict::new(value.py());
    options.set_item("signed", true)?;
    let bytes = value.call_method("to_bytes", (bits / 8 + 1, "little"), Some(&options))?;
    Ok(Integer::Big(bytes.cast::<PyBytes>()?.as_bytes().to_vec()))
}

fn big_integer<'py>(py: Python<'py>, bytes: &[u8]) -> PyResult<Bound<'py, PyAny>> {
    let options = pyo3::types::PyDict::new(py);
    options.set_item("signed", true)?;
    let arguments = (PyBytes::new(py, bytes), "little");
    py.get_type::<PyInt>().call_method("from_bytes", arguments, Some(&options))
}

/// A list of tuples from nodes in preorder.
pub(crate) fn nodes_to_python<'py>(
    py: Python<'py>,
    nodes: &[Node],
) -> PyResult<Bound<'py, PyList>> {
    let items = nodes.iter().map(|node| node_to_python(py, node)).collect::<PyResult<Vec<_>>>()?;
    PyList::new(py, items)
}

fn node_to_python<'py>(py: Python<'py>, node: &Node) -> PyResult<Bound<'py, PyTuple>> {
    let (tag, payload) = value_to_python(py, &node.value)?;
    match &node.key {
        None => (tag, payload).into_pyobject(py),
        Some(key) => (tag, payload, key_to_python(py, key)?).into_pyobject(py),
    }
}

fn value_to_python<'py>(py: Python<'py>, value: &Value) -> PyResult<(u8, Bound<'py, PyAny>)> {
    Ok(match value {
        Value::None => (NONE, py.None().into_bound(py)),
        Value::Bool(value) => (BOOL, value.into_bound_py_any(py)?),
        Value::Int(value) => (INT, value.into_bound_py_any(py)?),
        Value::BigInt(bytes) => (INT, big_integer(py, bytes)?),
        Value::Float(value) => (FLOAT, value.into_bound_py_any(py)?),
        Value::Complex(real, imag) => {
            (COMPLEX, PyComplex::from_doubles(py, *real, *imag).into_any())
        }
        Value::Str(text) => (STR, text.into_bound_py_any(py)?),
        Value::Bytes(bytes) => (BYTES, PyBytes::new(py, bytes).into_any()),
        Value::Tensor(index) => (TENSOR, index.into_bound_py_any(py)?),
        Value::NumpyScalar { dtype, bytes } => {
            (NUMPY_SCALAR, (dtype, PyBytes::new(py, bytes)).into_bound_py_any(py)?)
        }
        Value::TorchDtype(name) => (TORCH_DTYPE, name.into_bound_py_any(py)?),
        Value::TorchDevice(name) => (TORCH_DEVICE, name.into_bound_py_any(py)?),
        Value::TorchSize(sizes) => (TORCH_SIZE, PyTuple::new(py, sizes)?.into_any()),
        Value::NumpyDtype(name) => (NUMPY_DTYPE, name.into_bound_py_any(py)?),
        Value::Dict { len, kind, metadata } => {
            (DICT, (*len, *kind as u8, *metadata).into_bound_py_any(py)?)
        }
        Value::List { len } => (LIST, len.into_bound_py_any(py)?),
        Value::Tuple { len } => (TUPLE, len.into_bound_py_any(py)?),
    })
}

fn key_to_python<'py>(py: Python<'py>, key: &Key) -> PyResult<Bound<'py, PyAny>> {
    match key {
        Key::Str(text) => text.into_bound_py_any(py),
        Key::Int(value) => value.into_bound_py_any(py),
        Key::BigInt(bytes) => big_integer(py, bytes),
        Key::Bool(value) => value.into_bound_py_any(py),
        Key::Float(value) => value.into_bound_py_any(py),
        Key::Bytes(bytes) => Ok(PyBytes::new(py, bytes).into_any()),
        Key::None => Ok(py.None().into_bound(py)),
    }
}

/// `(storage, kind, dtype, item bytes, shape, strides, offset, requires_grad, slice)`, where a
/// slice of a larger tensor is the `(shape, offsets)` of where it stands.
type TensorTuple = (u32, u8, String, u32, Vec<u64>, Vec<u64>, u64, bool, Option<SliceTuple>);
type SliceTuple = (Vec<u64>, Vec<u64>);

/// Tensor records from a list of tuples.
pub(crate) fn tensors_from_python(tensors: &Bound<'_, PyList>) -> PyResult<Vec<TensorRecord>> {
    tensors.iter().map(|tensor| tensor_from_python(&tensor)).collect()
}

fn tensor_from_python(tensor: &Bound<'_, PyAny>) -> PyResult<TensorRecord> {
    let fields: TensorTuple = tensor.extract()?;
    let (storage, kind, dtype, item_bytes, shape, strides, offset, requires_grad, slice) = fields;
    let kind = match kind {
        0 => TensorKind::Torch,
        1 => TensorKind::TorchParameter,
        2 => TensorKind::Numpy,
        _ => {
            let why = format!("unknown kind {kind}");
            return Err(misuse(tensor.py(), "reading a tensor record", why));
        }
    };
    Ok(TensorRecord {
        storage,
        kind,
        dtype,
        item_bytes,
        shape,
        strides,
        offset,
        requires_grad,
        slice: slice.map(|(shape, offsets)| GlobalSlice { shape, offsets }),
    })
}

/// A list of tuples from tensor records.
pub(crate) fn tensors_to_python<'py>(
    py: Python<'py>,
    tensors: &[TensorRecord],
) -> PyResult<Bound<'py, PyList>> {
    let items =
        tensors.iter().map(|tensor| tensor_to_python(py, tensor)).collect::<PyResult<Vec<_>>>()?;
    PyList::new(py, items)
}

fn tensor_to_python<'py>(py: Python<'py>, tensor: &TensorRecord) -> PyResult<Bound<'py, PyTuple>> {
    let kind: u8 = match tensor.kind {
        TensorKind::Torch => 0,
        TensorKind::TorchParameter => 1,
        TensorKind::Numpy => 2,
    };
    let shape = PyTuple::new(py, &tensor.shape)?;
    let strides = PyTuple::new(py, &tensor.strides)?;
    let slice = match &tensor.slice {
        Some(slice) => Some((PyTuple::new(py, &slice.shape)?, PyTuple::new(py, &slice.offsets)?)),
        None => None,
    };
    let TensorRecord { storage, dtype, item_bytes, offset, requires_grad, .. } = tensor;
    (storage, kind, dtype, item_bytes, shape, strides, offset, requires_grad, slice)
        .into_pyobject(py)
}
