// SPDX-License-Identifier: Apache-2.0

package inference

import (
	"io"
	"slices"
)

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
	spans    []splice // the latest last

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

// Restore takes back what Set or Remove did to a top-level field.
func (e *Edits) Restore(field string) {
	e.built = false
	e.top = slices.DeleteFunc(e.top, func(x edit) bool { return x.name == field })
}

// SetSampling is [Edits.Set] inside sampling_params, which is added when it is absent or null. Other values than an
// object, such as SGLang's list, stay as they are; so does what Set or Remove did to sampling_params as a whole.
func (e *Edits) SetSampling(field string, jsonValue []byte) {
	e.change(&e.sampling, field, orNull(jsonValue))
}

// RemoveSampling removes all occurrences of a field of sampling_params.
func (e *Edits) RemoveSampling(field string) { e.change(&e.sampling, field, nil) }

// KeepSpans undoes what ReplaceSpan and AddMember did.
func (e *Edits) KeepSpans() {
	e.built = false
	e.spans = nil
}

// ReplaceSpan puts one JSON value in place of another one, at any depth: of, such as a [Media.Part], is where that is in
// the body that came, whatever else is edited. Of changes that overlap the outer one wins: replacing or removing a field
// takes everything in it along. For one span the last call wins; an empty span is left alone. jsonValue is as for Set.
func (e *Edits) ReplaceSpan(of Span, jsonValue []byte) {
	if of.Start >= 0 && of.Start < of.End && of.End <= e.req.Body.Len {
		e.built = false
		e.spans = append(e.spans, splice{of, orNull(jsonValue)})
	}
}

// AddMember puts a member at the beginning of an object that has others: a part of the prompt, as for ReplaceSpan, not
// one of the objects whose fields have methods of their own. Nothing of the object is copied.
func (e *Edits) AddMember(object Span, name string, jsonValue []byte) {
	if object.Start >= 0 && object.Len() > 2 && object.End <= e.req.Body.Len {
		e.built = false
		x := edit{name: name, value: orNull(jsonValue)}
		e.spans = append(e.spans, splice{Span{object.Start + 1, object.Start + 1}, append(appendField(nil, &x, false), ',')})
	}
}

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
