"""The 29 coarse classes of the quick-start data, and which art belongs to which class.

Emoji are sorted by Unicode subgroup, Open Clip Art drawings and stamps by folder. The folders were
filled by hand by their authors, so `NOT_OF_ITS_FOLDER` names the drawings that lie in a class
folder but do not show the class: they keep their captions and get no class.
"""

import json
from pathlib import Path

PROMPTS = Path(__file__).resolve().parents[2] / "prompts" / "quickstart.json"

EMOJI_SUBGROUPS = {
    "mammal": ["animal-mammal"],
    "bird": ["animal-bird"],
    "insect": ["animal-bug"],
    "fish or sea animal": ["animal-marine", "food-marine"],
    "flower": ["plant-flower"],
    "tree or plant": ["plant-other"],
    "fruit": ["food-fruit"],
    "vegetable": ["food-vegetable"],
    "dessert": ["food-sweet"],
    "drink": ["drink"],
    "flag": ["flag", "country-flag", "subdivision-flag"],
    "building": ["place-building", "place-religious"],
    "land vehicle": ["transport-ground"],
    "boat": ["transport-water"],
    "musical instrument": ["musical-instrument"],
    "sports equipment": ["sport"],
    "clothing": ["clothing"],
    "tool": ["tool"],
    "smiley face": [
        "face-smiling",
        "face-affection",
        "face-tongue",
        "face-hand",
        "face-neutral-skeptical",
        "face-sleepy",
        "face-unwell",
        "face-hat",
        "face-glasses",
        "face-concerned",
        "face-negative",
    ],
    "clock": ["time"],
    "road sign": ["transport-sign", "warning"],
    "money": ["money"],
    "book": ["book-paper"],
    "weather": ["sky & weather"],
    "telephone": ["phone"],
    "computer": ["computer"],
    "arrow": ["arrow"],
    "body part": [
        "body-parts",
        "hand-fingers-open",
        "hand-fingers-partial",
        "hand-single-finger",
        "hand-fingers-closed",
    ],
}

# Emoji that show something else than their subgroup says, by Unicode name.
EMOJI_LEFT_OUT = frozenset(
    name.strip()
    for line in """
    paw prints|pig nose|feather|wing|spider web|microbe|spiral shell|coral|empty nest
    nest with eggs|mushroom|honey pot|ice|building construction|brick|rock|wood|station
    manual wheelchair|motorized wheelchair|skateboard|roller skate|motorway|railway track
    oil drum|fuel pump|wheel|police car light|horizontal traffic light|vertical traffic light
    construction|anchor|ring buoy|folding hand fan|shopping bags|hair pick|prayer beads|lipstick
    ring|gem stone|dagger|crossed swords|bomb|boomerang|bow and arrow|shield|balance scale
    white cane|link|chains|skull|skull and crossbones|receipt|chart increasing with yen
    page with curl|scroll|page facing up|newspaper|rolled-up newspaper|bookmark tabs|bookmark|label
    new moon|waxing crescent moon|first quarter moon|waxing gibbous moon|full moon
    waning gibbous moon|last quarter moon|waning crescent moon|crescent moon|new moon face
    first quarter moon face|last quarter moon face|full moon face|ringed planet|star|glowing star
    shooting star|milky way|comet|fire|battery|low battery|electric plug|abacus|mechanical arm
    mechanical leg
    """.splitlines()
    for name in line.split("|")
    if name.strip()
)
EMOJI_MOVED = {"bus stop": "road sign", "stop sign": "road sign"}

# Space-separated beginnings of paths; the longest that fits decides.
OPENCLIPART_FOLDERS = {
    "mammal": "animals/mammals/",
    "bird": "animals/birds/",
    "insect": "animals/bugs/",
    "fish or sea animal": "animals/fish/ animals/crawfish",
    "flower": "plants/flowers/ plants/daffodil",
    "tree or plant": (
        "plants/trees/ plants/albero plants/arbre plants/bamboo plants/cactus plants/cacuts "
        "plants/cannabis plants/fall_coloured plants/leaf plants/olivier plants/palmtree "
        "plants/reed plants/shamrock plants/tree_"
    ),
    "fruit": "food/fruit/",
    "vegetable": "food/vegetables/",
    "dessert": "food/desserts/",
    "drink": "food/beverages/",
    "flag": "signs_and_symbols/flags/",
    "building": (
        "buildings/homes/ buildings/carnegie buildings/ch_teau buildings/church buildings/eiffel "
        "buildings/factory buildings/firestation buildings/grain buildings/perspectival "
        "buildings/school_country buildings/us_capitol buildings/water_tower"
    ),
    "land vehicle": (
        "transportation/vehicles/ transportation/ambulans transportation/autos "
        "transportation/big_truck transportation/bicycle transportation/bike "
        "transportation/blazer transportation/bmw transportation/bus1 transportation/bus2 "
        "transportation/bus_01 transportation/car_ transportation/dodge "
        "transportation/fire_engine transportation/formula transportation/hummer "
        "transportation/motorcycle transportation/old_car transportation/old_truck "
        "transportation/redcar transportation/road_runner transportation/shelby "
        "transportation/skoda transportation/small_truck transportation/toyota "
        "transportation/tramway transportation/truck"
    ),
    "boat": (
        "transportation/boating/boat_ transportation/boating/sailboat "
        "transportation/boating/sailing_caps transportation/boating/sailing_heel "
        "transportation/boating/sailing_sunset transportation/vehicles/trawler"
    ),
    "musical instrument": "recreation/music/",
    "sports equipment": "recreation/sports/",
    "clothing": "people/clothing/",
    "tool": "tools/",
    "smiley face": "people/smilies/",
    "clock": "signs_and_symbols/clocks/",
    "road sign": (
        "transportation/roadsigns/ transportation/Evel transportation/Motorway "
        "transportation/airplane transportation/bambi transportation/bus_lane "
        "transportation/bus_opposite transportation/buses transportation/cattle "
        "transportation/crosswind transportation/cycle transportation/drawbridge "
        "transportation/end_daul transportation/grounded transportation/horse "
        "transportation/kaboom transportation/lorry_length transportation/no_ "
        "transportation/old_folks transportation/pass_either transportation/street_sign "
        "transportation/vehicles/cycle_ transportation/vehicles/crossroads "
        "transportation/vehicles/curve_ahead transportation/vehicles/quay_sign"
    ),
    "money": "signs_and_symbols/money/",
    "book": "education/books/",
    "weather": "signs_and_symbols/weather/",
    "telephone": "office/telephone/",
    "computer": "computer/hardware/",
    "arrow": "shapes/arrows/",
    "body part": "people/bodypart/",
    "planet": "geography/astronomy/ science/astronomy/",
}

NOT_OF_ITS_FOLDER = {
    "buildings/homes/": "lowtec",
    "animals/mammals/": "shaezy skoynk squeek housecats/cat_scrath",
    "animals/birds/": "contour_ba duck_yellow manager_mi mirjam tux_didier turkey_on wing_ stormo",
    "animals/bugs/": "virus",
    "animals/fish/": "kallisti paesaggio",
    "plants/flowers/": "cartoon_tree",
    "plants/trees/": "bowsaw bypass christmas_balls",
    "food/fruit/": (
        "apple_juice candied gumnut juice_glass kallisti pie_ slate straw tile_ tree_ turkey"
    ),
    "food/beverages/": "flower-pot ice_cube icecube macchina",
    "signs_and_symbols/flags/": (
        "america/inuit america/route europe/ampel florence golf_flag miscellany/flags_of semaphore "
        "southen_cross"
    ),
    "transportation/vehicles/": (
        "aircraft airplane departing lighthouse military plane_ quay rocket sledge the_mad toy_ "
        "wing"
    ),
    "recreation/music/": (
        "45_rpm a_man bach bass_clef boombox double_ fifties funny gramophone headphones "
        "microphone musical_note piano_theory quaver simple_croche sixteenth treble vinyl "
        "trumpet_harmon trumpet_straight"
    ),
    "recreation/sports/": (
        "a_boy anelli baseball_cap binoculars cronometro football_pitch judo karate sport_ "
        "tennis_sh ticket"
    ),
    "people/clothing/": "earring gold_chain hats/jacob hats/wedding jewelry/ shoe_print",
    "tools/": (
        "binocolo blue_vacuum bottle bucket bussola chiave digital electric_lighter ferro "
        "forchettoni gallows green_burner hurricane insecticide ironing kexi key lampada lock "
        "mattone metal_cage natural nodding orange_burner padlock pan_ panel pansement pencil "
        "scart scolapasta secchio smoke telescope thermometer toothbrush toys/ umbrella vacuum "
        "vavuum weapons/"
    ),
    "people/smilies/": "3_faces air_ chav crossbones crystal fire_ portrait splash",
    "signs_and_symbols/clocks/": "minute_hand",
    "transportation/roadsigns/": "bus_symbol",
    "signs_and_symbols/money/": "diamond gold_chain saphire",
    "education/books/": "cartoon newspaper",
    "signs_and_symbols/weather/": "moon tsunami",
    "office/telephone/": "numero",
    "computer/hardware/": "digital gameboy handheld joystick rhythmbox",
    "shapes/arrows/": "reincarnat",
    "people/bodypart/": "fingerprint olifant",
    "geography/astronomy/": "00_moonphases southen_cross",
    "science/astronomy/": "southen_cross",
}

STAMP_FOLDERS = {
    "mammal": "animals/mammals/ animals/marsupials/",
    "bird": "animals/birds/",
    "insect": "animals/insects/",
    "fish or sea animal": "animals/fish/ animals/shellfish/",
    "flower": "plants/flowers/",
    "tree or plant": "plants/trees/",
    "fruit": "food/fruit/",
    "vegetable": "food/vegetables/",
    "dessert": "food/dessert/",
    "flag": "town/flags/",
    "building": "town/houses/",
    "land vehicle": (
        "vehicles/auto/ vehicles/construction/ vehicles/cycle/ vehicles/emergency/ "
        "vehicles/farming/ vehicles/locomotive/ vehicles/masstransit/ vehicles/race/"
    ),
    "boat": "vehicles/ship/",
    "musical instrument": "hobbies/music/",
    "sports equipment": "sports/",
    "clothing": "clothes/",
    "tool": "household/tools/",
    "smiley face": "symbols/faces/",
    "road sign": "town/roadsigns/",
    "money": "symbols/money/",
    "body part": "people/body_parts/",
    "planet": "space/planets/ space/moon/",
}


def class_table() -> list[dict]:
    """The 29 classes (id, synset, names) in id order, as in `prompts/quickstart.json`."""
    return json.loads(PROMPTS.read_text(encoding="utf-8"))["classes"]


def class_ids() -> dict[str, int]:
    """First name of each class → its id."""
    return {entry["names"][0]: entry["id"] for entry in class_table()}


def emoji_class(subgroup: str, name: str) -> str | None:
    """Class of the emoji called `name` in a Unicode subgroup, None when it has none."""
    if name in EMOJI_LEFT_OUT:
        return None
    if name in EMOJI_MOVED:
        return EMOJI_MOVED[name]
    return next((c for c, subgroups in EMOJI_SUBGROUPS.items() if subgroup in subgroups), None)


def openclipart_class(path: str) -> str | None:
    """Class of an Open Clip Art drawing, from its path below the `png` folder."""
    for folder, stems in NOT_OF_ITS_FOLDER.items():
        if path.startswith(tuple(folder + stem for stem in stems.split())):
            # Only the folder's own class is refused: a trawler in vehicles/ is still a boat.
            return _longest_prefix(path, OPENCLIPART_FOLDERS, refused=folder)
    return _longest_prefix(path, OPENCLIPART_FOLDERS)


def stamp_class(path: str) -> str | None:
    """Class of a Tux Paint stamp, from its path below the `stamps` folder."""
    return _longest_prefix(path, STAMP_FOLDERS)


def _longest_prefix(path: str, table: dict[str, str], refused: str = "") -> str | None:
    matches = [
        (len(prefix), name)
        for name, prefixes in table.items()
        for prefix in prefixes.split()
        if prefix != refused and path.startswith(prefix)
    ]
    return max(matches)[1] if matches else None
