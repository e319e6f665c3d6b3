// SPDX-License-Identifier: Apache-2.0

package connectors

import (
	"bytes"
	"slices"

	"github.com/baton-epp/baton/inference"
)

const (
	// transferField is where vLLM reads and writes handles.
	transferField = "kv_transfer_params"
	// samplingField holds most parameters of Generate and SGLangGenerate.
	samplingField = "sampling_params"
)

// OneToken caps body to a single token in a single, unstreamed answer, in the words of r's API; nothing that changes
// the prompt is touched. It is what every wire's prefill leg starts from.
func OneToken(r *inference.Request, body *inference.Edits) {
	one, no := []byte("1"), []byte("false")
	body.Set("stream", no)
	body.Remove("stream_options")
	switch r.API {
	case inference.Generate:
		oneSampled(r, body, "max_tokens", "min_tokens")
		return
	case inference.SGLangGenerate:
		if isList(r, samplingField) { // one per prompt; one object for all does as well
			body.Set(samplingField, []byte(`{"max_new_tokens":1}`))
			return
		}
		oneSampled(r, body, "max_new_tokens", "min_new_tokens")
		return
	case inference.Responses:
		body.Set("max_output_tokens", one)
		body.Remove("background") // would be answered before it ran
	default:
		body.Set("max_tokens", one)
		if hasField(r, "max_completion_tokens") {
			body.Set("max_completion_tokens", one)
		}
	}
	body.Remove("min_tokens")
	body.Remove("min_completion_tokens")
	body.Remove("return_token_ids") // would send the prompt back
	if r.N > 1 {
		body.Set("n", one)
	}
}

// oneTokenExactly is [OneToken] for engines that let go of the blocks of an answer which ended before its limit: asked
// for at least one token, they draw no end of text for the first, and heed no stop. Responses and Messages cannot ask.
func oneTokenExactly(r *inference.Request, body *inference.Edits) {
	OneToken(r, body)
	switch r.API {
	case inference.Chat, inference.Completions:
		body.Set("min_tokens", []byte("1"))
	case inference.Generate:
		body.SetSampling("min_tokens", []byte("1"))
	default:
	}
}

// oneSampled does the same inside sampling_params, whose limits are called most and least.
func oneSampled(r *inference.Request, body *inference.Edits, most, least string) {
	body.SetSampling(most, []byte("1"))
	body.RemoveSampling(least)
	if r.N > 1 {
		body.SetSampling("n", []byte("1"))
	}
}

// setTransfer puts value where vLLM looks for kv_transfer_params.
func setTransfer(r *inference.Request, value []byte, body *inference.Edits) {
	if r.API == inference.Generate {
		body.SetSampling("extra_args", withMember(extraArgs(r), transferField, value))
		return
	}
	body.Set(transferField, value)
}

// clearTransfer takes back what setTransfer did.
func clearTransfer(r *inference.Request, body *inference.Edits) {
	if r.API != inference.Generate {
		body.Remove(transferField)
		return
	}
	if args := extraArgs(r); args != nil {
		body.SetSampling("extra_args", args)
		return
	}
	body.RemoveSampling("extra_args")
}

// hasField reports whether the client sent a top-level field.
func hasField(r *inference.Request, field string) bool {
	e := r.Edit()
	e.Remove(field)
	return !e.Empty()
}

// isList reports whether the client sent a list in a top-level field.
func isList(r *inference.Request, field string) bool {
	value, ok := r.Field(field)
	return ok && r.Body.Slice(value).Chunks[0][0] == '['
}

// extraArgs returns the client's sampling_params.extra_args without transfer fields, nil when there is no such object.
// The body is copied only where there is one, which real clients do not send.
func extraArgs(r *inference.Request) []byte {
	e := r.Edit()
	e.RemoveSampling("extra_args")
	if e.Empty() {
		return nil
	}
	e = r.Edit()
	e.StripTransferFields()
	params, _, err := inference.Field(bytes.Join(e.Chunks(), nil), samplingField)
	if err != nil || len(params) == 0 || params[0] != '{' {
		return nil
	}
	args, _, err := inference.Field(params, "extra_args")
	if err != nil || len(args) == 0 || args[0] != '{' {
		return nil
	}
	return slices.Clone(args)
}

// withMember returns object, which may be nil, with one more member at its end.
func withMember(object []byte, name string, value []byte) []byte {
	out := make([]byte, 0, len(object)+len(name)+len(value)+6)
	if inside := bytes.TrimSpace(bytes.TrimSuffix(object, []byte("}"))); len(inside) > 1 {
		out = append(append(out, inside...), ',')
	} else {
		out = append(out, '{')
	}
	out = append(append(append(out, '"'), name...), '"', ':')
	return append(append(out, value...), '}')
}
