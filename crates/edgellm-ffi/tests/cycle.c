/* The whole cycle in C: cycle MODEL SCRATCH. With MODEL alone: the milliseconds from the start of main to the first token. */
#define _POSIX_C_SOURCE 200809L
#include "edgellm.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#define CHECK(condition)                                                                                              \
    do {                                                                                                              \
        if (!(condition)) {                                                                                           \
            const char *said = edgellm_last_error();                                                                  \
            fprintf(stderr, "%s:%d: %s (last error: %s)\n", __FILE__, __LINE__, #condition, said ? said : "none");     \
            exit(1);                                                                                                  \
        }                                                                                                             \
    } while (0)

static double milliseconds(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * 1e3 + now.tv_nsec / 1e6;
}

struct heard {
    char text[4096];
    int pieces;
    int most;
    double first;
    edgellm_engine *engine;
};

static bool on_token(const char *text, void *user) {
    struct heard *heard = user;
    if (heard->pieces == 0) heard->first = milliseconds();
    strncat(heard->text, text, sizeof heard->text - strlen(heard->text) - 1);
    heard->pieces++;
    /* A call from inside is refused, not blocked. */
    if (heard->engine) CHECK(edgellm_remove_adapter(heard->engine) == EDGELLM_BUSY);
    return heard->most == 0 || heard->pieces < heard->most;
}

static int on_step(uint32_t step, uint32_t total, double loss, uint64_t bytes, void *user) {
    int *last = user;
    CHECK(total > 0 && loss > 0 && bytes > 0 && (int)step == *last + 1);
    *last = (int)step;
    return total == 7 ? 7 : step == 5 && total == 6 ? EDGELLM_STEP_STOP : EDGELLM_STEP_CONTINUE;
}

static void cold_start(const char *model, double start) {
    edgellm_engine *engine = NULL;
    struct heard heard = {.most = 1};
    CHECK(edgellm_load(model, NULL, &engine) == EDGELLM_OK);
    CHECK(edgellm_generate(engine, "Mara went to the", NULL, on_token, &heard, NULL) == EDGELLM_OK);
    CHECK(heard.pieces == 1);
    printf("%.1f\n", heard.first - start);
    edgellm_free(engine);
}

static void errors(const char *model, edgellm_engine *engine) {
    edgellm_engine *none = NULL;
    edgellm_load_options load = edgellm_load_options_default();
    edgellm_generate_options generate = edgellm_generate_options_default();
    CHECK(edgellm_load(NULL, NULL, &none) == EDGELLM_BAD_ARGUMENT && !none);
    CHECK(edgellm_load(model, NULL, NULL) == EDGELLM_BAD_ARGUMENT);
    CHECK(edgellm_load("/nowhere", NULL, &none) == EDGELLM_MODEL && strstr(edgellm_last_error(), "/nowhere"));
    CHECK(edgellm_load("\xff", NULL, &none) == EDGELLM_BAD_ARGUMENT && strstr(edgellm_last_error(), "UTF-8"));
    load.memory_budget_bytes = 1000;
    CHECK(edgellm_load(model, &load, &none) == EDGELLM_MEMORY && !none);
    CHECK(edgellm_generate(NULL, "a", NULL, NULL, NULL, NULL) == EDGELLM_BAD_ARGUMENT);
    CHECK(edgellm_generate(engine, NULL, NULL, NULL, NULL, NULL) == EDGELLM_BAD_ARGUMENT);
    generate.top_p = 2;
    CHECK(edgellm_generate(engine, "a", &generate, NULL, NULL, NULL) == EDGELLM_BAD_ARGUMENT);
    CHECK(edgellm_chat(engine, NULL, 0, NULL, NULL, NULL, NULL) == EDGELLM_BAD_ARGUMENT);
    CHECK(edgellm_adapt(engine, NULL, 0, NULL, NULL, NULL, NULL) == EDGELLM_BAD_ARGUMENT);
    CHECK(edgellm_save_adapter(engine, "/tmp/none") == EDGELLM_BAD_ARGUMENT);
    CHECK(edgellm_load_adapter(engine, "/nowhere") == EDGELLM_MODEL);
    edgellm_free(NULL);
    edgellm_string_free(NULL);
}

int main(int count, char **arguments) {
    double start = milliseconds();
    CHECK(count == 2 || count == 3);
    const char *model = arguments[1];
    if (count == 2) {
        cold_start(model, start);
        return 0;
    }
    CHECK(edgellm_last_error() == NULL && strchr(edgellm_version(), '.'));
    edgellm_engine *engine = NULL;
    CHECK(edgellm_load(model, NULL, &engine) == EDGELLM_OK);
    char *json = NULL;
    CHECK(edgellm_info(engine, &json) == EDGELLM_OK && strstr(json, "\"layers\":8"));
    edgellm_string_free(json);
    errors(model, engine);

    edgellm_generate_options options = edgellm_generate_options_default();
    options.max_tokens = 24;
    struct heard heard = {.engine = engine};
    CHECK(edgellm_generate(engine, "Mara went to the", &options, on_token, &heard, &json) == EDGELLM_OK);
    CHECK(heard.pieces > 3 && strstr(json, "\"finish\":\"length\""));
    edgellm_string_free(json);
    struct heard cut = {.most = 2};
    CHECK(edgellm_generate(engine, "Mara went to the", &options, on_token, &cut, &json) == EDGELLM_OK);
    CHECK(strstr(json, "\"finish\":\"cancelled\"") && strncmp(heard.text, cut.text, strlen(cut.text)) == 0);
    edgellm_string_free(json);
    char until[2] = {heard.text[strlen(heard.text) / 2], 0};
    const char *stops[] = {until};
    options.stop = stops;
    options.n_stop = 1;
    struct heard stopped = {0};
    CHECK(edgellm_generate(engine, "Mara went to the", &options, on_token, &stopped, NULL) == EDGELLM_OK);
    CHECK(!strchr(stopped.text, until[0]) && strncmp(heard.text, stopped.text, strlen(stopped.text)) == 0);
    options.n_stop = 0;

    edgellm_message talk[] = {{"user", "What is my favourite fruit?"}, {"assistant", "Blue pears from the tower."}};
    struct heard before = {0}, after = {0}, again = {0};
    CHECK(edgellm_chat(engine, talk, 1, &options, on_token, &before, NULL) == EDGELLM_OK);
    edgellm_example examples[] = {
        {.messages = talk, .n_messages = 2}, {.prompt = talk[0].content, .response = talk[1].content}};
    edgellm_adapt_options adapt = edgellm_adapt_options_default();
    adapt.batch = 2;
    adapt.window = 4;
    adapt.learning_rate = 5e-3;
    int last = 0;
    adapt.steps = 6;
    CHECK(edgellm_adapt(engine, examples, 2, &adapt, on_step, &last, &json) == EDGELLM_OK);
    CHECK(last == 5 && strstr(json, "\"stopped\":true"));
    edgellm_string_free(json);
    last = 0;
    adapt.steps = 7;
    CHECK(edgellm_adapt(engine, examples, 2, &adapt, on_step, &last, NULL) == EDGELLM_LISTENER);
    CHECK(strstr(edgellm_last_error(), "found 7"));
    last = 0;
    adapt.steps = 40;
    CHECK(edgellm_adapt(engine, examples, 2, &adapt, on_step, &last, NULL) == EDGELLM_OK && last == 40);
    CHECK(edgellm_chat(engine, talk, 1, &options, on_token, &after, NULL) == EDGELLM_OK);
    CHECK(strstr(after.text, talk[1].content) && strcmp(before.text, after.text) != 0);

    char path[1024];
    snprintf(path, sizeof path, "%s/adapter-c", arguments[2]);
    CHECK(edgellm_save_adapter(engine, path) == EDGELLM_OK);
    CHECK(edgellm_remove_adapter(engine) == EDGELLM_OK);
    CHECK(edgellm_load_adapter(engine, path) == EDGELLM_OK);
    CHECK(edgellm_chat(engine, talk, 1, &options, on_token, &again, NULL) == EDGELLM_OK);
    CHECK(strcmp(after.text, again.text) == 0);
    CHECK(edgellm_cancel(engine) == EDGELLM_OK && edgellm_pause(engine) == EDGELLM_OK && edgellm_resume(engine) == EDGELLM_OK);
    CHECK(edgellm_profile(&json) == EDGELLM_OK && strstr(json, "read_gbps"));
    edgellm_string_free(json);
    edgellm_free(engine);
    printf("load, generate, chat, adapt, save and load, errors\n");
    return 0;
}
