// SPDX-License-Identifier: Apache-2.0

package simulate

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"strconv"
	"strings"
	"unicode/utf16"
)

// fields is a JSON object read as Python does: names are case-sensitive and the last duplicate wins. The first value of
// a wrong type is kept in err.
type fields struct {
	m   map[string]json.RawMessage
	err *apiError
}

// marshal writes v as vLLM does: no spaces, no HTML escapes.
func marshal(v any) json.RawMessage {
	var b bytes.Buffer
	enc := json.NewEncoder(&b)
	enc.SetEscapeHTML(false)
	if err := enc.Encode(v); err != nil {
		return json.RawMessage(`null`) // own types always encode
	}
	return bytes.TrimSuffix(b.Bytes(), []byte("\n"))
}

// readObject reads a request body.
func readObject(body []byte) (*fields, *apiError) {
	body = toUTF8(body)
	f := &fields{}
	err := json.Unmarshal(body, &f.m)
	if err != nil {
		if fixed := nullNaN(body); fixed != nil {
			err = json.Unmarshal(fixed, &f.m)
		}
	}
	if err == nil && f.m != nil {
		return f, nil
	}
	if syntax, ok := errors.AsType[*json.SyntaxError](err); ok || len(bytes.TrimSpace(body)) == 0 {
		at := len(body)
		if ok {
			at = int(syntax.Offset)
		}
		return nil, badJSON(at, len(body))
	}
	return nil, invalid("body", "model_attributes_type", "Input should be a valid dictionary or object to extract fields from", "<body>")
}

func badJSON(at, size int) *apiError {
	loc := "body." + strconv.Itoa(min(at, size))
	e := invalid(loc, "json_invalid", "JSON decode error", "<dict of 0 items>")
	e.message = strings.TrimSuffix(e.message, "}") + ", 'ctx': {'error': 'Expecting value'}}"
	if at >= size {
		e.message = strings.Replace(e.message, "Expecting value", "Expecting property name enclosed in double quotes", 1)
	}
	return e
}

// toUTF8 reads UTF-16 as Python's json.loads does.
func toUTF8(b []byte) []byte {
	var order binary.ByteOrder
	switch {
	case len(b) < 4:
		return b
	case b[0] == 0xfe && b[1] == 0xff, b[0] == 0 && b[1] != 0:
		order = binary.BigEndian
	case b[0] == 0xff && b[1] == 0xfe, b[0] != 0 && b[1] == 0:
		order = binary.LittleEndian
	default:
		return bytes.TrimPrefix(b, []byte("\xef\xbb\xbf"))
	}
	units := make([]uint16, len(b)/2)
	for i := range units {
		units[i] = order.Uint16(b[2*i:])
	}
	return []byte(strings.TrimPrefix(string(utf16.Decode(units)), "\ufeff"))
}

// nullNaN replaces the literals NaN, Infinity and -Infinity, which Python reads, by null; nil when there are none.
func nullNaN(b []byte) []byte {
	out := make([]byte, 0, len(b))
	inString, changed := false, false
	for i := 0; i < len(b); i++ {
		if n := literal(b[i:]); !inString && n > 0 {
			out = append(out, "null"...)
			i += n - 1
			changed = true
			continue
		}
		switch {
		case b[i] == '"':
			inString = !inString
		case b[i] == '\\' && inString && i+1 < len(b):
			out = append(out, b[i])
			i++
		}
		out = append(out, b[i])
	}
	if !changed {
		return nil
	}
	return out
}

func literal(b []byte) int {
	for _, l := range []string{"NaN", "Infinity", "-Infinity"} {
		if bytes.HasPrefix(b, []byte(l)) {
			return len(l)
		}
	}
	return 0
}

// raw returns a field that is there and not null.
func (f *fields) raw(name string) (json.RawMessage, bool) {
	v, ok := f.m[name]
	if !ok || string(v) == "null" {
		return nil, false
	}
	return v, true
}

func (f *fields) fail(name, kind, msg string, v json.RawMessage) {
	if f.err == nil {
		f.err = invalid("body."+name, kind, msg, string(v[:min(len(v), 40)]))
	}
}

// integer reads a number as pydantic does: whole floats and numbers in strings count.
func (f *fields) integer(name string) (int, bool) {
	v, ok := f.raw(name)
	if !ok {
		return 0, false
	}
	n, err := strconv.ParseFloat(strings.Trim(string(v), `"`), 64)
	if err != nil || n != math.Trunc(n) || math.Abs(n) > 1<<53 {
		f.fail(name, "int_parsing", "Input should be a valid integer", v)
		return 0, false
	}
	return int(n), true
}

func (f *fields) number(name string) (float64, bool) {
	v, ok := f.raw(name)
	if !ok {
		return 0, false
	}
	n, err := strconv.ParseFloat(strings.Trim(string(v), `"`), 64)
	if err != nil {
		f.fail(name, "float_parsing", "Input should be a valid number", v)
		return 0, false
	}
	return n, true
}

func (f *fields) boolean(name string) bool {
	v, ok := f.raw(name)
	if !ok {
		return false
	}
	switch strings.ToLower(strings.Trim(string(v), `"`)) {
	case "true", "1", "1.0", "yes", "on", "t", "y":
		return true
	case "false", "0", "0.0", "no", "off", "f", "n":
		return false
	}
	f.fail(name, "bool_parsing", "Input should be a valid boolean", v)
	return false
}

func (f *fields) text(name string) string {
	v, ok := f.raw(name)
	if !ok {
		return ""
	}
	var s string
	if err := json.Unmarshal(v, &s); err != nil {
		f.fail(name, "string_type", "Input should be a valid string", v)
	}
	return s
}

// texts reads a string or an array of strings.
func (f *fields) texts(name string) []string {
	v, ok := f.raw(name)
	if !ok {
		return nil
	}
	var list []string
	if v[0] == '[' && json.Unmarshal(v, &list) == nil {
		return list
	}
	if s := f.text(name); s != "" {
		return []string{s}
	}
	return nil
}

// object reads a nested object.
func (f *fields) object(name string) *fields {
	v, ok := f.raw(name)
	if !ok {
		return nil
	}
	sub := &fields{}
	if err := json.Unmarshal(v, &sub.m); err != nil {
		f.fail(name, "dict_type", "Input should be a valid dictionary", v)
		return nil
	}
	return sub
}

// adopt makes the first error of a nested object this one's.
func (f *fields) adopt(sub *fields) {
	if f.err == nil {
		f.err = sub.err
	}
}

// readTransfer reads kv_transfer_params.
func readTransfer(f *fields) *transfer {
	t := &transfer{
		doRemoteDecode: f.boolean("do_remote_decode"), doRemotePrefill: f.boolean("do_remote_prefill"),
		engineID: f.text("remote_engine_id"), requestID: f.text("remote_request_id"), host: f.text("remote_host"),
	}
	t.port, _ = f.integer("remote_port")
	t.tpSize, _ = f.integer("tp_size")
	t.cachedTokens, _ = f.integer("remote_prefill_cached_tokens")
	t.push = f.text("transfer_mode") == transferPush
	v, ok := f.raw("remote_block_ids")
	if !ok || v[0] != '[' {
		return t
	}
	t.hasBlocks = true
	var nested [][]json.Number
	var flat []json.Number
	if json.Unmarshal(v, &nested) == nil {
		for _, group := range nested {
			flat = append(flat, group...)
		}
	} else if json.Unmarshal(v, &flat) != nil {
		t.hasBlocks = false
	}
	for _, n := range flat {
		id, err := n.Int64()
		if err != nil {
			id = math.MaxInt64
		}
		t.blocks = append(t.blocks, id)
	}
	return t
}

// rawTransfer finds the request's transfer parameters; extra is a second place they may be in.
func rawTransfer(f, extra *fields) *transfer {
	for _, from := range []*fields{f, extra} {
		if from == nil {
			continue
		}
		if sub := from.object("kv_transfer_params"); sub != nil {
			t := readTransfer(sub)
			t.raw = from.m["kv_transfer_params"]
			return t
		}
	}
	return nil
}

func tooLong(have, limit int) *apiError {
	return badRequest("input_tokens", "%s", fmt.Sprintf("This model's maximum context length is %d tokens. However, your request has %d "+
		"input tokens. Please reduce the length of the input messages. (parameter=input_tokens, value=%d)", limit, have, have))
}
