// SPDX-License-Identifier: Apache-2.0

package simulate

import (
	"encoding/json"
	"fmt"
	"strconv"
)

// api is the wire format of a generation request.
type api int

const (
	apiCompletions api = iota
	apiChat
	apiResponses
	apiMessages
	apiGenerate
	apiNative // SGLang's /generate
)

// call is one generation request, read and checked.
type call struct {
	api          api
	id           string // the answer's id, with its prefix
	created      int64  // Unix seconds
	model        string // as the answer names it
	lora         string // adapter, "" for the base model
	stream       bool
	usage        bool // stream_options.include_usage
	contUsage    bool // stream_options.continuous_usage_stats
	n            int
	maxTokens    int // 0 is no limit
	modelLimit   int // max_model_len
	minTokens    int
	natural      bool // no limit was given: the answer ends by itself
	temperature  float64
	seed         uint64
	stop         []string
	echo         bool
	logprobs     int // -1 none
	promptLogs   bool
	returnTokens bool
	cacheSalt    string
	prompts      [][]uint32
	media        []mediaItem
	encodings    map[string]*encodingHandle // of the media, from ec_transfer_params
	texts        []string                   // of the prompts, where they were text
	transfer     *transfer                  // of NIXL
	leg          leg                        // of another wire
	phase        string
	fields       *fields // of the body, until the request is queued
	extra        *fields // of sampling_params.extra_args, nil where there is none
	attempt      string
	requestID    string // X-Request-Id

	// Of SGLang.
	rids         []string // request id of each sequence, where the body names them
	batch        bool     // the prompt is a list
	each         []limits // of each prompt, where they differ
	logprobStart int      // prompt token from which on log probabilities are answered; -1 none
}

const (
	phasePrefill  = "prefill"
	phaseTransfer = "transfer"
	phasePlain    = "plain"
	phaseDecode   = "decode"
	phaseEncode   = "encode"
	phaseQuery    = "query" // of a bootstrap server
	phaseAny      = "any"
)

// phaseOf says which leg of a disaggregated request t makes of it.
func phaseOf(t *transfer) string {
	switch {
	case t != nil && t.doRemoteDecode:
		return phasePrefill
	case t != nil && t.doRemotePrefill:
		return phaseTransfer
	}
	return phasePlain
}

// holds reports whether the blocks are to be kept for a decode engine.
func (c *call) holds() bool { return c.transfer != nil && c.transfer.doRemoteDecode }

// sequenceID is the engine's internal id of an answer, without its random end.
func (c *call) sequenceID(prompt, child int) string {
	id := c.id
	switch c.api {
	case apiCompletions:
		id += "-" + strconv.Itoa(prompt)
	case apiResponses:
		id += "_" + strconv.Itoa(prompt)
	case apiChat, apiMessages, apiGenerate, apiNative:
	}
	if c.n > 1 {
		id = strconv.Itoa(child) + "_" + id
	}
	return id
}

// answerSeed makes the answers of different seeds and indexes differ, unless the temperature is 0.
func (c *call) answerSeed(child int) uint64 {
	if c.temperature == 0 {
		return 0
	}
	return mix(c.seed+1) ^ mix(uint64(child)) //nolint:gosec // an index
}

// limit is how many tokens q may have.
func (c *call) limit(q *sequence) int {
	room := c.modelLimit - q.prompt
	if n := c.limitsOf(q).maxTokens; n > 0 {
		return min(n, room)
	}
	return room
}

// promptTokens is the number of prompt tokens of all prompts.
func (c *call) promptTokens() int {
	n := 0
	for _, t := range c.prompts {
		n += len(t)
	}
	return n
}

// apiError is an error answer.
type apiError struct {
	status  int
	kind    string // error.type
	message string
	param   string // error.param, "" is null
	plain   bool   // raised before the API's own error shape applies (validation)
}

func (e *apiError) Error() string { return e.message }

func badRequest(param, format string, args ...any) *apiError {
	return &apiError{status: 400, kind: "BadRequestError", message: fmt.Sprintf(format, args...), param: param}
}

// invalid is an error of the request model's validation, before any handler saw the request.
func invalid(loc, kind, msg, input string) *apiError {
	return &apiError{
		status: 400, kind: "Bad Request", param: loc, plain: true,
		message: fmt.Sprintf("1 validation error:\n  {'type': '%s', 'loc': '%s', 'msg': '%s', 'input': '%s'}", kind, loc, msg, input),
	}
}

var (
	errInternal = &apiError{status: 500, kind: "InternalServerError", message: "Internal server error"}
	errDead     = &apiError{
		status: 500, kind: "InternalServerError",
		message: "EngineCore encountered an issue. See stack trace (above) for the root cause.",
	}
)

// errorBody is the error object of vLLM's OpenAI routes.
type errorBody struct {
	Error struct {
		Message string  `json:"message"`
		Type    string  `json:"type"`
		Param   *string `json:"param"`
		Code    int     `json:"code"`
	} `json:"error"`
}

// anthropicError is the error object of /v1/messages.
type anthropicError struct {
	Type  string `json:"type"`
	Error struct {
		Type    string `json:"type"`
		Message string `json:"message"`
	} `json:"error"`
}

// body is the error's JSON in the shape of a.
func (e *apiError) body(a api) json.RawMessage {
	if a == apiMessages && !e.plain {
		v := anthropicError{Type: "error"}
		v.Error.Type, v.Error.Message = e.kind, e.message
		return marshal(v)
	}
	var v errorBody
	v.Error.Message, v.Error.Type, v.Error.Code = e.message, e.kind, e.status
	if e.param != "" {
		v.Error.Param = &e.param
	}
	return marshal(v)
}
