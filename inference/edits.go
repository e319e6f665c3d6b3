// SPDX-License-Identifier: Apache-2.0

package inference

import "io"

// Edits is a list of changes to a request's body, made by splicing bytes: what is not changed leaves as it came, in
// the order it came. Every method may be called any number of times; for one field the last call wins, and a field
// that is set stays even if it is a transfer field that [Edits.StripTransferFields] removes. The request's body is
// never written to, so several Edits of one request can live side by side. Of an [Unknown] request only transfer
// fields can be removed; the other edits do nothing. Not safe for concurrent use.
type Edits struct {
	req      *Request
	strip    bool
	top      []edit
	sampling []edit

	// What these make of the body, once built.
	built   bool
	splices []splice
	chunks  [][]byte
	size    int
}

// An edit sets or removes one field of an object.
type edit struct {
	name  string
	value []byte // nil to remove
	done  bool   // while building: the value has found its member
}

// Edit starts an empty list of edits of r's body.
func (r *Request) Edit() *Edits { return &Edits{req: r} }

// StripTransferFields removes what only a router may send (see [Request.HasTransferFields]), all duplicates, at the
// top level and where an engine would read it besides: in sampling_params, its extra_args, and vllm_xargs.
func (e *Edits) StripTransferFields() {
	e.strip = true
	e.built = false
}

// SetModel replaces the model's name.
func (e *Edits) SetModel(model string) { e.Set("model", quote(model)) }

// Set replaces the value of a top-level field: that of the last occurrence, the others are removed. A field that is
// not there is added at the end. jsonValue must be one valid JSON value (none at all is taken for null) and must not
// change while the edits are used.
func (e *Edits) Set(field string, jsonValue []byte) { e.change(&e.top, field, orNull(jsonValue)) }

// Remove removes all occurrences of a top-level field.
func (e *Edits) Remove(field string) { e.change(&e.top, field, nil) }

// SetSampling is [Edits.Set] inside sampling_params, which is added when it is absent or null. Other values than an
// object, such as SGLang's list, stay as they are; so does what Set or Remove did to sampling_params as a whole.
func (e *Edits) SetSampling(field string, jsonValue []byte) {
	e.change(&e.sampling, field, orNull(jsonValue))
}

// RemoveSampling removes all occurrences of a field of sampling_params.
func (e *Edits) RemoveSampling(field string) { e.change(&e.sampling, field, nil) }

func (e *Edits) change(list *[]edit, field string, value []byte) {
	e.built = false
	if *list == nil {
		*list = make([]edit, 0, 8)
	}
	for i := range *list {
		if (*list)[i].name == field {
			(*list)[i].value = value
			return
		}
	}
	*list = append(*list, edit{name: field, value: value})
}

func orNull(value []byte) []byte {
	if len(value) == 0 {
		return []byte("null")
	}
	return value
}

// Empty reports whether the edited body is the body that came.
func (e *Edits) Empty() bool {
	e.build()
	return len(e.splices) == 0
}

// Len is the number of bytes of the edited body.
func (e *Edits) Len() int {
	e.build()
	return e.size
}

// Chunks returns the edited body: parts of the original chunks and the inserted bytes, in order. The slices must not
// be written to.
func (e *Edits) Chunks() [][]byte {
	e.build()
	return e.chunks
}

// Reader reads the edited body. It is cheap to make, and readers do not disturb each other, as http.Request.GetBody
// asks; edits made later do not show in it.
func (e *Edits) Reader() io.ReadCloser { return &chunkReader{chunks: e.Chunks()} }

// A chunkReader reads chunks. It writes them out whole where it is asked to.
type chunkReader struct {
	chunks [][]byte
	at     int // in the first chunk
}

func (r *chunkReader) Read(p []byte) (int, error) {
	for len(r.chunks) > 0 {
		if rest := r.chunks[0][r.at:]; len(rest) > 0 {
			n := copy(p, rest)
			r.at += n
			return n, nil
		}
		r.chunks, r.at = r.chunks[1:], 0
	}
	return 0, io.EOF
}

func (r *chunkReader) WriteTo(w io.Writer) (int64, error) {
	var total int64
	for len(r.chunks) > 0 {
		n, err := w.Write(r.chunks[0][r.at:])
		total += int64(n)
		r.at += n
		if err != nil {
			return total, err
		}
		r.chunks, r.at = r.chunks[1:], 0
	}
	return total, nil
}

func (r *chunkReader) Close() error {
	r.chunks = nil
	return nil
}
